import os

# The tests run in several processes (pyproject.toml), and many start others: one thread each does not make them wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
