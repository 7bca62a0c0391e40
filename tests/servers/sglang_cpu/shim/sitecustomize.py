"""For the tests: lets the registry's torchvision, built for CUDA, be imported beside a CPU build of torch.

On import, torchvision registers shape functions for two operators of its compiled half. That half cannot be loaded
here, so the operators do not exist, and registering for them fails. They are declared, without a kernel, just before
torchvision is first imported: calling one is an error, and a server of text models calls none.

SGLang can return the experts of tokens on a CPU but for one call of CUDA, which is left out.
"""

import sys
from importlib.abc import MetaPathFinder

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept = []  # a library's declarations live as long as the object


class _DeclareOperators(MetaPathFinder):
    """Finds nothing; hears of torchvision's import before anyone looks for it."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            from torch.library import Library

            library = Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                library.define(operator + _SIGNATURE)
            _kept.append(library)


class _PlainHostMemory(MetaPathFinder):
    """What keeps the experts of tokens registers its host memory with CUDA. It is made of plain memory here."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "sglang.srt.state_capturer.base":
            sys.meta_path.remove(self)
            from sglang.srt.mem_cache.pool_host import common  # pyright: ignore[reportMissingImports]

            def plain(dims, dtype, device, pin_memory, allocator, registration_granularity_bytes=None):
                return allocator.allocate(dims, dtype=dtype, device=device)

            common.ALLOC_MEMORY_FUNCS["cpu"] = plain


sys.meta_path.insert(0, _DeclareOperators())
sys.meta_path.insert(0, _PlainHostMemory())
