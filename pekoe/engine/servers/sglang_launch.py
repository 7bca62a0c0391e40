"""Starts SGLang's server with the key of the environment: on a command line every user of the machine could read it.

A file to be run by the Python of SGLang's environment: `python sglang_launch.py ARGUMENTS...`.
"""

import os
import runpy
import sys

if __name__ == "__main__":
    sys.argv += ["--api-key", os.environ.pop("PEKOE_SERVER_KEY")]
    # As `python -m` does it: processes that the server spawns import the main module by its name.
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
