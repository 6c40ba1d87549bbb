"""A data set as a Ray Data set, for batch jobs and a user's own pipelines; training uses `labelmill.data.source`.

Own datasource, because Ray's tar reader loses rows silently on damaged shards and after storage errors: here counts and
checksums are compared with the manifest and a retry fetches the whole range again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
from ray.data import DataContext, read_datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from labelmill.data.reading import decode_block, plan_read, read_blocks
from labelmill.data.spec import StreamSpec


class PlanSource(Datasource):
    """The windows of a stream as read tasks, in plan order.

    Rows have `key`, the field, the label columns, `__position__`, and `__hole__` (null, or why the row can't be used).
    """

    def __init__(self, spec: StreamSpec, decode: bool = False) -> None:
        self._spec, self._decode = spec, decode

    @property
    def windows(self) -> int:
        """Read tasks that it makes."""
        return sum(1 for _ in self._spec.plan.windows(self._spec.start, self._spec.end))

    def estimate_inmemory_data_size(self) -> int | None:
        return int((self._spec.end - self._spec.start) * self._spec.sample_bytes)

    def get_read_tasks(self, parallelism: int, *args: Any, **options: Any) -> list[ReadTask]:
        spec, tasks = self._spec, []
        for window in spec.plan.windows(spec.start, spec.end):
            read = plan_read(spec, window, spec.start, spec.end)
            size = int(len(read.row_S) * spec.sample_bytes)
            about = BlockMetadata(num_rows=len(read.row_S), size_bytes=size, input_files=None, exec_stats=None)
            finish = partial(decode_block, field=spec.field, size=spec.image_size, channels=spec.channels)
            tasks.append(ReadTask(partial(_blocks, read, finish if self._decode else None), about))
        return tasks


def _blocks(read: Any, finish: Callable[[pa.Table], pa.Table] | None) -> Iterator[pa.Table]:
    for table in read_blocks(read):
        yield finish(table) if finish else table


def ray_dataset(spec: StreamSpec, decode: bool = False, read_cpus: float = 0.25) -> Any:
    """The samples of `[spec.start, spec.end)` as a `ray.data.Dataset`.

    Args:
        spec: the stream; its plan gives the order, which the data set keeps when the context preserves order (set here).
        decode: images as uint8 lists of H x W x C (the shape is in the field's metadata) instead of encoded bytes.
        read_cpus: CPUs that a read task reserves.
    """
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    # Ray merges blocks up to this size and then cuts them to it: whole blocks as emitted cost least
    context.target_max_block_size = max(1 << 20, int(2 * spec.block_rows * spec.sample_bytes))
    source = PlanSource(spec, decode)
    return read_datasource(
        source, override_num_blocks=source.windows, ray_remote_args={"num_cpus": read_cpus, "max_retries": 3}
    )
