"""Runs in the kernel of every notebook before its first cell (PYTHONSTARTUP, see conf.py)."""

import os
import warnings

# The kernel asks commands for colours and moving progress lines, which a page cannot show.
for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "CLICOLOR"):
    os.environ.pop(name, None)
# tqdm, which other packages import, misses a package for progress bars in browsers.
warnings.filterwarnings("ignore", message="IProgress not found")
