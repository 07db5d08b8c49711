"""Arrow in processes that are this program's own."""

import sys

import pyarrow as pa


def without_pandas() -> None:
    """Have Arrow take pandas for not installed in this process, unless it has been loaded.

    Arrow loads it with the first array that it makes, to see whether the values are pandas' own:
    a fifth of a second and 40 MB, and none here are.
    """
    if "pandas" not in sys.modules:
        sys.meta_path.insert(0, _NoPandas)
        try:
            pa.array([None])  # it looks once
        finally:
            sys.meta_path.remove(_NoPandas)


class _NoPandas:
    """What Python asks for a module: there is no pandas."""

    @staticmethod
    def find_spec(name: str, path: object, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)
