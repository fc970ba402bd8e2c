from hvpd._cli.common import show_bytes
from hvpd._cli.top import fleet_frame, frame
from hvpd.v1 import server_pb2


def load(seconds, products, shares=(), counts=(0, 0, 0)):
    found = server_pb2.GetLoadResponse(
        state="serving",
        products=products,
        vectors=4 * products,
        pending_vectors=3,
        pending_limit=4096,
        resident_bytes=3 << 20,
        points=7,
        budget_bytes=1 << 30,
        request_seconds=server_pb2.Histogram(bounds=[0.001, 0.01], counts=counts),
        queue_seconds=server_pb2.Histogram(bounds=[0.001, 0.01], counts=[0, 0, 0]),
        launch_vectors=server_pb2.Histogram(bounds=[1, 2], counts=[0, 0, 0]),
        shares=shares,
    )
    found.time.FromNanoseconds(int(seconds * 1e9))
    return found


def share(objective, products, device):
    return server_pb2.Share(objective=objective, tenant="vision", products=products, device_seconds=device)


def test_rates_and_quantiles_are_those_between_two_moments():
    before = load(10, 100, [share("a", 90, 5.0)], (1000, 0, 0))
    now = load(12, 300, [share("a", 190, 6.0), share("b", 100, 1.5), share("refused", 0, 0.0)], (1000, 200, 0))
    lines = frame("gpu-box:7070", before, now)
    assert lines[0] == "gpu-box:7070  serving  0 calls"
    assert lines[1].startswith("products 100/s   vectors 400/s   failures 0/s")
    assert lines[2] == "latency  p50 5.5 ms   p90 9.1 ms   p99 9.91 ms"
    assert "no products   waiting 3 of 4096 vectors" in lines[3]
    assert "3 MiB of 1 GiB resident   7 points" in lines[5]
    rows = [line.split() for line in lines[8:]]
    assert rows == [["b", "vision", "50", "0", "75%"], ["a", "vision", "50", "0", "50%"]]


def test_a_server_that_was_started_again_counts_from_zero():
    lines = frame("gpu-box:7070", load(10, 1000, [], (900, 0, 0)), load(12, 10, [], (10, 0, 0)))
    assert lines[1].startswith("products 5/s")
    assert lines[2].startswith("latency  p50 0.5 ms")


def test_large_numbers_have_no_exponent():
    lines = frame("gpu-box:7070", load(10, 0), load(11, 18_420, counts=(0, 0, 9)))
    assert lines[1].startswith("products 18,420/s   vectors 73,680/s")
    assert [show_bytes(1020), show_bytes(1020 << 10), show_bytes(1536)] == ["1,020 B", "1,020 KiB", "1.5 KiB"]


def test_one_moment_has_no_rates():
    now = load(10, 100, [share("a", 90, 5.0)], (1000, 0, 0))
    lines = frame("gpu-box:7070", now, now)
    assert lines[1] == "products -/s   vectors -/s   failures -/s"
    assert lines[2] == "latency  -"
    assert "-   waiting 3 of 4096 vectors" in lines[3]
    assert "median launch - vectors" in lines[4]
    assert lines[-1].split() == ["a", "vision", "-", "-", "-"]


def test_several_servers_have_a_row_each_and_one_table_of_objectives():
    before = {
        "a:7070": load(10, 100, [share("f", 90, 5.0)], (1000, 0, 0)),
        "b:7070": load(20, 50, [share("f", 50, 1.0)]),
    }
    now = {
        "a:7070": load(12, 300, [share("f", 190, 6.0)], (1000, 200, 0)),
        "b:7070": load(22, 70, [share("f", 70, 1.5), share("g", 20, 0.1)]),
        "c:7070": None,
    }
    lines = [line.split() for line in fleet_frame(before, now)]
    assert " ".join(lines[1]) == "a:7070 serving 0 100 400 0 5.5 ms 3 of 4096 7 3 MiB of 1 GiB"
    assert " ".join(lines[2]) == "b:7070 serving 0 10 40 0 - 3 of 4096 7 3 MiB of 1 GiB"
    assert lines[3] == ["c:7070", "away", "-", "-", "-", "-", "-", "-", "-", "-"]
    assert lines[6:] == [
        ["f", "vision", "60", "0", "75%", "a:7070", "67%,", "b:7070", "33%"],
        ["g", "vision", "10", "0", "5%", "b:7070", "100%"],
    ]


def test_a_server_with_hardly_any_of_the_device_time_is_left_out():
    before = {each: load(10, 1, [share("f", 1, 0.0), share("idle", 1, 0.0)]) for each in ("a:7070", "b:7070")}
    now = {
        "a:7070": load(12, 9, [share("f", 9, 1.0), share("idle", 1, 0.0)]),
        "b:7070": load(12, 9, [share("f", 9, 0.005), share("idle", 1, 0.0)]),
    }
    lines = [line.split() for line in fleet_frame(before, now)]
    assert lines[5] == ["f", "vision", "8", "0", "50%", "a:7070", "100%"]
    assert lines[6] == ["idle", "vision", "0", "0", "0%", "-"]


def test_a_server_of_several_that_was_started_again_counts_from_zero():
    lines = fleet_frame({"a:7070": load(10, 1000), "b:7070": None}, {"a:7070": load(12, 10), "b:7070": load(12, 10)})
    assert lines[1].split()[:4] == ["a:7070", "serving", "0", "5"]
    assert lines[2].split()[:4] == ["b:7070", "serving", "0", "-"]


def test_the_median_launch_has_whole_vectors():
    before, now = load(10, 100), load(12, 300)
    now.launch_vectors.counts[0] = 5
    assert "median launch 1 vectors" in frame("gpu-box:7070", before, now)[4]
