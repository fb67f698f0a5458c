# SPDX-License-Identifier: Apache-2.0
"""What goes for objects that hold addresses of memory: wrappers between plan() and run()."""

from __future__ import annotations

from typing import NoReturn


class Uncopyable:
    """Refuses copy.copy, copy.deepcopy and pickle. A copy would launch kernels on the buffers of the original, or, once
    that is gone, on memory that has another owner."""

    def _refuse_to_be_copied(self, *_: object) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} cannot be copied: it holds addresses of its buffers; make a new one and call plan()"
        )

    __copy__ = __deepcopy__ = __reduce_ex__ = __reduce__ = _refuse_to_be_copied
