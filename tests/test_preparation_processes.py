"""What preparing leaves behind and how it starts its processes."""

import signal
import subprocess
import sys
import tempfile
import threading

import pytest

from training.data import preparation
from training.data.preparation import prepare


def test_nothing_is_left_in_the_folder_for_temporary_files(tmp_path, monkeypatch):
    """Not even by a killed process: there is nothing in it while the work is done."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    seen = []

    def build_shard(*arguments):
        seen.append(sorted(path.name for path in temporary.iterdir()))
        return original(*arguments)

    original = preparation._build_shard
    monkeypatch.setattr(preparation, "_build_shard", build_shard)
    options = {"num_train": 2, "num_validation": 0, "num_test": 0}
    prepare("phantom", tmp_path / "out", size=64, num_proc=1, options=options, say=lambda message: None)
    assert seen == [[]]
    assert not list(temporary.iterdir())


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs signal masks")
def test_interrupts_wait_until_processes_are_started():
    code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    started, reached = [], []
    with pytest.raises(KeyboardInterrupt), preparation._interrupts_waiting():
        signal.pthread_kill(
            threading.get_ident(), signal.SIGINT
        )  # other threads, as of pytest-xdist, may take it else
        started.append(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        reached.append(True)
    assert started == ["True\n"] and reached == [True]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
