"""Runs at the start of every Python that inherits the simulated card; then the sitecustomize that it hides, if any."""

import importlib.util
import os
import sys


def _hook():
    if "ASCEND_SIM_LIBRARIES" not in os.environ:
        return

    path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "hook.py")
    spec = importlib.util.spec_from_file_location("_ascend_sim_hook", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.install()


def _next():
    here = os.path.dirname(os.path.abspath(__file__))
    elsewhere = [folder for folder in sys.path if os.path.abspath(folder or os.getcwd()) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_hook()
_next()
