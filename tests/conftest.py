"""What every test run needs before the first import of SciPy, matplotlib or hypothesis' tests."""

import os

from hypothesis import settings

# scikit-learn skips its array API checks where SciPy was imported without this.
os.environ.setdefault("SCIPY_ARRAY_API", "1")
# No screen is needed, here or in the examples that the tests start.
os.environ.setdefault("MPLBACKEND", "Agg")

# Timings of single examples say nothing on a shared machine. In CI the examples are the same in
# every run, so that a red run can be repeated; at home they are drawn anew.
settings.register_profile("home", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "home")
