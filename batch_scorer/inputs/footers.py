"""What a Parquet file's footer declares, held against the file's size before a page is decoded.

A damaged footer may declare any number of rows, and all else is made from it: the shards, and what
is read for them.
"""

from collections.abc import Iterator
from itertools import pairwise

import pyarrow.parquet as pq

from batch_scorer.errors import ShardError, ShardReason

_MAGIC_BYTES = 4
_LENGTH_BYTES = 4
_COUNTED_BYTES = 1 << 26
_VALUE_BYTES = 16


def check_footer(metadata: pq.FileMetaData, size_bytes: int, most_bytes: int) -> None:
    """Raise ShardError for counts that disagree, pages that are not in the file or in two columns
    at once, and more than `most_bytes` unpacked bytes, or as many rows or values.

    Only the footer is looked at, in time and memory of its own size: what is true of the rows
    themselves is seen as they are read. Bytes that belong to no column are allowed. pyarrow leaves
    a dictionary page for each column of an empty row group, polars writes the description of each
    column behind it, and page indexes and Bloom filters lie there too.
    """
    schema = metadata.schema
    is_flat = [not schema.column(i).max_repetition_level for i in range(metadata.num_columns)]
    end = size_bytes - _MAGIC_BYTES - _LENGTH_BYTES - metadata.serialized_size
    num_rows = unpacked_bytes = 0
    places: list[tuple[int, int]] = []
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if group.num_columns != len(is_flat):
            raise _unreadable(
                f"row group {index} has {group.num_columns} columns, the schema {len(is_flat)}"
            )
        if group.num_rows < 0:
            raise _wrong_count(f"row group {index} declares {group.num_rows} rows")
        num_rows += group.num_rows
        for leaf, flat in enumerate(is_flat):
            chunk = group.column(leaf)
            values = chunk.num_values
            if values < group.num_rows or (flat and values != group.num_rows):
                raise _wrong_count(
                    f"row group {index} declares {group.num_rows} rows, and {values} values in its "
                    f"column {chunk.path_in_schema}"
                )
            refuse_more(values, "values", size_bytes, most_bytes)
            packed = chunk.total_compressed_size
            if packed < 0 or chunk.total_uncompressed_size < 0:
                raise _unreadable(f"row group {index} declares a negative size")
            if values:
                start = _start(chunk)
                if start < _MAGIC_BYTES or start + packed > end:
                    raise _unreadable(
                        f"row group {index}, column {chunk.path_in_schema}: {packed} bytes from "
                        f"{start} on are not all in the file"
                    )
                places.append((start, start + packed))
            unpacked_bytes += chunk.total_uncompressed_size
    if num_rows != metadata.num_rows:
        raise _wrong_count(f"the file declares {metadata.num_rows} rows, its row groups {num_rows}")
    refuse_more(num_rows, "rows", size_bytes, most_bytes)
    refuse_more(unpacked_bytes, "unpacked bytes", size_bytes, most_bytes)
    places.sort()
    for (_, stop), (start, _) in pairwise(places):
        if start < stop:
            raise _unreadable(f"two columns, or two row groups, share the bytes from {start} on")


def refuse_more(count: int, unit: str, size_bytes: int, most_bytes: int) -> None:
    """Raise ShardError if a file of `size_bytes` declares more than `most_bytes` of something that
    takes a byte at least."""
    if count > most_bytes:
        raise ShardError(
            ShardReason.TOO_LARGE,
            f"{count} {unit} in a file of {size_bytes} bytes; max_unpacked_gib and max_expansion "
            f"allow {most_bytes}",
        )


def doubtful_groups(metadata: pq.FileMetaData) -> Iterator[tuple[int, str, int]]:
    """The row groups with more rows than stored bytes: many equal values are packed so, and only
    reading them tells them from a wrong count.

    Of each the column that takes least to read, and the rows that fit in memory at once: no value
    is larger than its column's pages.
    """
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        chunks = [group.column(leaf) for leaf in range(group.num_columns)]
        if chunks and group.num_rows > sum(chunk.total_compressed_size for chunk in chunks):
            least = min(chunks, key=lambda chunk: (chunk.num_values, chunk.total_uncompressed_size))
            batch_rows = _COUNTED_BYTES // max(least.total_uncompressed_size, _VALUE_BYTES)
            yield index, least.path_in_schema, max(1, batch_rows)


def _start(chunk: pq.ColumnChunkMetaData) -> int:
    """Where the chunk's first page lies; some writers give 0 for a dictionary that there is not."""
    data: int = chunk.data_page_offset
    dictionary: int = chunk.dictionary_page_offset or 0
    return dictionary if 0 < dictionary < data else data


def _wrong_count(detail: str) -> ShardError:
    return ShardError(ShardReason.WRONG_ROW_COUNT, detail)


def _unreadable(detail: str) -> ShardError:
    return ShardError(ShardReason.UNREADABLE_FILE, f"not readable as Parquet: {detail}")
