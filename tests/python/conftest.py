"""One thread of torch: the models are small, and the machine may be busy. KVPLANE_TORCH_THREADS sets another number."""
import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("KVPLANE_TORCH_THREADS", "1"))
