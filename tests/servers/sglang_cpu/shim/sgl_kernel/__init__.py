"""For the tests: stands where SGLang's compiled kernels would, which the registry has no CPU build of.

SGLang's CPU engine imports some of their names at start. On a processor without AMX it computes everything in plain
torch and calls none. So every name that ends in `_cpu` can be imported, and raises when called; any other is absent.
"""

__version__ = "0+absent"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if not name.endswith("_cpu"):
        raise ImportError(f"sgl_kernel.{name}: not a CPU kernel")

    def absent(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name}: SGLang's compiled CPU kernels are not installed")

    return absent
