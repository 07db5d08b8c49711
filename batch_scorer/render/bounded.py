"""A chat template that cannot work or write without end.

A template is foreign code, and transformers runs it without a bound. Here the same source is
compiled with transformers' settings, in an environment that counts steps. The count depends on the
template and the conversation only, never on a clock: a row that is marked for it is marked on every
machine, and again when the run is resumed.

A step is a turn of a loop, a call, a filter, an item of a list, or a KiB of text that is passed,
made or written. What a single step can make is bounded too.
"""

import re
import threading
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sized, ValuesView
from functools import lru_cache, wraps
from typing import Any, cast

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

STEPS = 20_000
"""For any conversation. Public templates take about 20 for a message."""
_STEP_CHARACTERS = 1024
"""Of text, which count as a step."""
STEPS_PER_STEP = 1000
"""For every step that it takes to look at all of the conversation."""
MOST_CHARACTERS = 1 << 25
"""Of a single text, and of all that is written: more than any model reads."""
_MOST_MADE = 1 << 28
"""Characters that a call could make of what it is given, in the worst case."""
_LONGEST_SOURCE = 1 << 20
_MOST_BITS = 4096
"""Of a whole number."""

_REPEATING = frozenset({
    "batch", "center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "slice",
    "truncate", "wordwrap", "zfill"
})  # fmt: skip
"""Filters and methods that can make a text as long as the product of two things they are given."""
_FORMATTING = frozenset({"format", "format_map", "%"})
_WIDE = re.compile(r"\d{5}|\*")
_PASSING_ON = frozenset({
    "attr", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length",
    "list", "map", "max", "min", "random", "reject", "rejectattr", "reverse", "select",
    "selectattr", "sort", "sum", "unique"
})  # fmt: skip
"""Filters that make no text of what they are given: they see lists, and not all that is in them."""

_OF_DICTS = frozenset(dir(dict))
"""Attributes of every dict, which go before its keys."""

_TURNS, _PARTS, _SUM = "turns of a loop", "parts of a value", "a sum"
"""Filters that stand around parts of the template; no template can name them."""


class TooMuchWork(TemplateError):
    """The template works or writes more than any public one does."""


class BoundedTemplate:
    """Raises what jinja raises for a source that is no template, and TooMuchWork for a long one."""

    def __init__(self, source: str) -> None:
        if len(source) > _LONGEST_SOURCE:
            raise TooMuchWork(f"the template itself has {len(source)} characters")
        self._meter = _Meter()
        self._lock = threading.Lock()
        self._template: Template = _Environment(self._meter).from_string(source)
        # Every rendering copies them, and a chain of mappings is slow at that.
        self._template.globals = dict(self._template.globals)

    def render(self, arguments: dict[str, Any]) -> str:
        """The text. Raises TooMuchWork, and whatever the template raises."""
        with self._lock:  # there is one meter
            self._meter.start(arguments)
            context = self._template.new_context(arguments)
            pieces: list[str] = []
            characters = 0
            for piece in self._template.root_render_func(context):
                characters += len(piece)
                if characters > MOST_CHARACTERS:
                    raise TooMuchWork(f"the template writes more than {MOST_CHARACTERS} characters")
                pieces.append(piece)
            return "".join(pieces)


def syntax_problem(source: str) -> str | None:
    """Why this is no template; None: it is one."""
    try:
        compiled(source)
    except (TemplateError, RecursionError) as error:
        return str(error) or type(error).__name__
    return None


@lru_cache(maxsize=64)
def compiled(source: str) -> BoundedTemplate:
    """Compiled once in a process, as in transformers."""
    return BoundedTemplate(source)


class _Meter:
    """The steps that are left to a rendering.

    What the conversation allows beyond the first STEPS is counted when these are used up: hardly
    any template needs more.
    """

    __slots__ = ("_arguments", "left")

    def __init__(self) -> None:
        self.left = STEPS
        self._arguments: Mapping[str, Any] | None = None

    def start(self, arguments: Mapping[str, Any]) -> None:
        self.left = STEPS
        self._arguments = arguments

    def count(self, steps: int = 1) -> None:
        self.left -= steps
        if self.left < 0:
            self._take_more()

    def _take_more(self) -> None:
        """Add the steps that the conversation allows; raise where they are used up too."""
        arguments, self._arguments = self._arguments, None
        if arguments is not None:
            used, self.left = self.left, 1 << 62
            self.weigh(arguments)
            self.left = used + STEPS_PER_STEP * ((1 << 62) - self.left)
        if self.left < 0:
            raise TooMuchWork("the template loops or works without end on this conversation")

    def weigh(self, value: Any) -> None:
        """Count a value with all that it holds."""
        if isinstance(value, str):
            size = len(value)
            self.left -= 1 + size // _STEP_CHARACTERS
            if self.left < 0:
                self._take_more()
            if size > MOST_CHARACTERS:
                raise TooMuchWork(f"the template makes a text of {size} characters")
        elif isinstance(value, int):
            self.count()
            if value.bit_length() > _MOST_BITS:
                raise TooMuchWork("the template calculates with endless numbers")
        elif isinstance(value, Mapping):
            self.count()
            for key, item in value.items():
                self.weigh(key)
                self.weigh(item)
        elif isinstance(value, list | tuple | KeysView | ValuesView | ItemsView):
            self.count()
            for item in value:
                self.weigh(item)
        elif isinstance(value, Namespace):
            self.weigh(getattr(value, "_Namespace__attrs"))  # noqa: B009  # what its text shows
        else:
            self.count()

    def weigh_given(self, name: str, *given: Any) -> None:
        """Count what a function, filter or operator is given. Raises where so much could be made of
        it that it must not run."""
        if name in _PASSING_ON:
            self.count(1 + (len(given[0]) >> 5 if isinstance(given[0], Sized) else 0))
            return
        for value in given:
            self.weigh(value)
        if name in _REPEATING:
            sizes = sorted(abs(v) if isinstance(v, int) else len(v) for v in given if _has_size(v))
            if len(sizes) > 1 and sizes[-1] * sizes[-2] > _MOST_MADE:
                raise TooMuchWork(f"the template could make an endless text with {name}")
        if name in _FORMATTING and (
            any(isinstance(v, int) and abs(v) > 10**5 for v in given[1:])
            or (isinstance(given[0], str) and _WIDE.search(given[0]))
        ):
            raise TooMuchWork(f"the template could make an endless text with {name}")


def _has_size(value: object) -> bool:
    return isinstance(value, int | Sized)


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment, whose templates count their steps on a meter."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, meter: _Meter) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        @pass_context
        def written(context: Context, value: Any) -> Any:
            if type(value) is str and len(value) < _STEP_CHARACTERS:
                meter.count()
            else:
                meter.weigh(value)
            return value

        theirs = _compile_jinja_template("").environment
        super().__init__(
            trim_blocks=theirs.trim_blocks,
            lstrip_blocks=theirs.lstrip_blocks,
            extensions=[type(extension) for extension in theirs.extensions.values()],
            optimized=False,  # or constants are calculated while the template is compiled
            finalize=written,
        )
        self._meter = meter
        self.globals = {name: each for name, each in theirs.globals.items() if name != "lipsum"}
        self.filters = {name: self._counted(name, each) for name, each in theirs.filters.items()}
        self.filters[_TURNS] = self._turns
        self.filters[_SUM] = self._sum
        self.filters[_PARTS] = self._weighed

    def _parse(self, *source: Any) -> nodes.Template:
        return cast(nodes.Template, _Marker().visit(super()._parse(*source)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "*" and not numbers and _has_size(left) and _has_size(right):
            sizes = [v if isinstance(v, int) else len(v) for v in (left, right)]
            if sizes[0] * sizes[1] > MOST_CHARACTERS:
                raise TooMuchWork("the template repeats a text without end")
        if operator == "**" and numbers and left.bit_length() * right > _MOST_BITS:
            raise TooMuchWork("the template calculates with endless numbers")
        if operator == "%" and isinstance(left, str):
            self._meter.weigh_given(
                operator, left, *(right if isinstance(right, tuple) else [right])
            )
        return self._made(super().call_binop(context, operator, left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        # As it ends there, without the error on the way: messages are dicts, and `message.role` is
        # what templates ask for most.
        if type(obj) is dict and attribute in obj and attribute not in _OF_DICTS:
            return obj[attribute]
        return super().getattr(obj, attribute)

    def call(self, context: Context, function: Any, *given: Any, **named: Any) -> Any:
        meter = self._meter
        if isinstance(function, LoopContext):  # a recursive loop: these are its turns
            meter.count(len(given[0]) if given and isinstance(given[0], Sized) else 1)
        elif not isinstance(function, Macro):
            # A text's `format` comes wrapped by the sandbox.
            method = getattr(function, "__wrapped__", function)
            owner = getattr(method, "__self__", None)
            if isinstance(owner, str):
                meter.weigh_given(method.__name__, owner, *given, *named.values())
            else:
                meter.weigh_given("", *given, *named.values())
        return self._made(super().call(context, function, *given, **named))

    def _counted(self, name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
        passes = int(hasattr(filter_, "jinja_pass_arg"))
        is_plain = name not in _PASSING_ON | _REPEATING | _FORMATTING

        @wraps(filter_)
        def counted(*given: Any, **named: Any) -> Any:
            if is_plain and not passes and len(given) == 1 and not named:
                self._meter.weigh(given[0])
            else:
                self._meter.weigh_given(name, *given[passes:], *named.values())
            return self._made(filter_(*given, **named))

        return counted

    def _turns(self, values: Any, steps: int) -> Iterator[Any]:
        for value in values:
            self._meter.count(steps)
            yield value

    def _weighed(self, value: Any) -> Any:
        """The value with all that it holds: lists may hold one list over and over."""
        self._meter.weigh(value)
        return value

    def _sum(self, first: Any, *others: Any) -> Any:
        short = 0
        for other in others:
            first = first + other
            if type(first) is str and len(first) < _STEP_CHARACTERS:
                short += 1
            else:
                first = self._made(first)
        self._meter.count(short)
        return first

    def _made(self, value: Any) -> Any:
        """The value, once its size is known to be in bounds."""
        if isinstance(value, str | int):
            self._meter.weigh(value)
        elif isinstance(value, Sized):
            self._meter.count(1 + (len(value) >> 5))
        return value


class _Marker(NodeTransformer):
    """Puts filters around what loops go over, around sums, and around lists and texts made of
    others."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        data = sum(len(each.data) for each in node.find_all(nodes.TemplateData))
        node.iter = _filtered(node.iter, _TURNS, nodes.Const(1 + (data >> 7)))
        return node

    def visit_List(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        constant = all(isinstance(each, nodes.Const) for each in node.iter_child_nodes())
        return node if constant else _filtered(node, _PARTS)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        return self.visit_List(node) if node.ctx == "load" else node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        """A constant text that is written is as good as one that stands between the marks."""
        self.generic_visit(node)
        node.nodes = [
            nodes.TemplateData(each.value, lineno=each.lineno)
            if isinstance(each, nodes.Const) and isinstance(each.value, str)
            else each
            for each in node.nodes
        ]
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Filter:
        """Sums are most of what a template does: one call for all terms of one."""
        terms: list[nodes.Expr] = []
        first: nodes.Expr = node
        while isinstance(first, nodes.Add):
            terms.append(first.right)
            first = first.left
        first, *others = [self.visit(term) for term in [first, *reversed(terms)]]
        return _filtered(first, _SUM, *others)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        node.nodes = [_filtered(each, _PARTS) for each in node.nodes]
        return _filtered(node, _PARTS)


def _filtered(node: nodes.Node, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(
        cast(nodes.Expr, node), name, list(arguments), [], None, None, lineno=node.lineno
    )
