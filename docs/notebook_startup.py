"""Runs in the kernel of every notebook before its first cell (PYTHONSTARTUP, see conf.py)."""

import os
import subprocess
import warnings

from IPython import get_ipython

# The kernel asks commands for colours and moving progress lines, which a page cannot show.
for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "CLICOLOR"):
    os.environ.pop(name, None)
# tqdm, which other packages import, misses a package for progress bars in browsers.
warnings.filterwarnings("ignore", message="IProgress not found")


def bash(line, cell):
    """`%%bash` in one piece: IPython's own passes output on in chunks, between which myst-nb would break lines."""
    done = subprocess.run(["bash", "-ec", cell], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout)
    done.check_returncode()


get_ipython().register_magic_function(bash, magic_kind="cell")
