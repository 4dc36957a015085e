from support.faults import soak


def test_nothing_is_lost(server, tmp_path):
    """A short soak test. ``make soak`` runs hundreds of steps, with all kinds of ends, and measures memory."""
    report = soak.soak(server, tmp_path, 32, ends=("killed in a step", "killed in a save"), reach=20)
    assert report["logs equal"], report
    assert report["steps skipped"] == 1
    assert report["samples replaced"] > 0
    assert report["saves that failed"] > 0
    assert sum(report["ended by"].values()) > 1
