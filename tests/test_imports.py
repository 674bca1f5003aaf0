"""A command's imports: few, and not searched for garbage."""

import subprocess
import sys


def printed(code):
    """By a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()


REFUSED = """
import gc, sys
from hymba_lightning.__main__ import main
sys.argv = ['hymba', 'fit', '--config', 'no_such_file']
try:
    main()
except SystemExit:
    pass
"""
UNUSED = {
    "scipy",
    "torchvision",
    "transformers",
    "datasets",
    "pandas",
    "onnxruntime",
    "torchmetrics.functional",
    "numba",
}


def test_a_fit_imports_nothing_that_only_metrics_of_others_use():
    lines = printed(REFUSED + f"print('torchmetrics.metric' in sys.modules, sorted({UNUSED!r} & set(sys.modules)))")
    assert lines == ["True []"]


def test_what_a_fit_imports_is_not_searched_for_garbage():
    lines = printed(
        REFUSED + "print(gc.get_stats()[2]['collections'], gc.get_freeze_count() > 100_000, gc.isenabled())"
    )
    assert lines == ["0 True True"]


AGAIN = """
import weakref
class Ring:
    pass
ring = Ring()
ring.itself, seen = ring, weakref.ref(ring)
del ring
try:
    main()
except SystemExit:
    pass
gc.collect()
print(seen())
"""


def test_what_is_garbage_before_a_second_command_of_a_process_is_found():
    assert printed(REFUSED + AGAIN) == ["None"]


IN_PARTS = """
from hymba_lightning.imports import import_torchmetrics_in_parts
import_torchmetrics_in_parts()
import sys, torchmetrics
from torchmetrics import Metric, MetricCollection
from torchmetrics.aggregation import MeanMetric
print(torchmetrics.__version__, hasattr(torchmetrics, '__wrapped__'), 'torchmetrics.functional' in sys.modules)
print(torchmetrics.Accuracy.__module__, torchmetrics.Metric is Metric, issubclass(torchmetrics.Accuracy, Metric))
print(torchmetrics.MeanMetric is MeanMetric, torchmetrics.utilities.__name__)
print(hasattr(torchmetrics, 'no_such_metric'))
"""


def test_the_rest_of_torchmetrics_comes_when_it_is_asked_for():
    version, *lines = printed(IN_PARTS)
    assert version.split()[1:] == ["False", "False"]
    assert version[0].isdigit()
    assert lines == ["torchmetrics.classification.accuracy True True", "True torchmetrics.utilities", "False"]


AT_ONCE = """
from hymba_lightning.imports import import_torchmetrics_in_parts
import_torchmetrics_in_parts()
import threading, torchmetrics
found = []
threads = [threading.Thread(target=lambda: found.append(torchmetrics.Accuracy.__name__)) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(found)
"""
ALL = """
from hymba_lightning.imports import import_torchmetrics_in_parts
import_torchmetrics_in_parts()
from torchmetrics import *
print(Accuracy.__name__)
"""
ANOTHERS = """
import sys, types
sys.modules["torchmetrics"] = mine = types.ModuleType("torchmetrics")
from hymba_lightning.imports import import_torchmetrics_in_parts
import_torchmetrics_in_parts()
print(sys.modules["torchmetrics"] is mine)
"""


def test_the_rest_of_torchmetrics_comes_to_threads_that_ask_at_once():
    assert printed(AT_ONCE) == [str(["Accuracy"] * 4)]


def test_the_rest_of_torchmetrics_comes_to_an_import_of_all():
    assert printed(ALL) == ["Accuracy"]


def test_what_somebody_put_in_the_place_of_torchmetrics_stays():
    assert printed(ANOTHERS) == ["True"]
