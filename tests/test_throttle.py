from perpetuo.throttle import FORGET_SECONDS, Throttle, network_of


def guess(throttle: Throttle, name: str, times: int, now: float = 0.0) -> float:
    """Fails `times` times, each as soon as it may; the moment at which the last was made."""
    for _ in range(times):
        now += throttle.wait(name, now)
        throttle.fail(name, now)
    return now


def test_first_failures_cost_no_delay():
    throttle = Throttle(free=5)
    assert guess(throttle, "ada", 5) == 0
    assert throttle.wait("ada", 0) == 0


def test_delay_doubles_up_to_a_minute():
    throttle = Throttle(free=1)
    now, waits = 0.0, []
    for _ in range(9):
        throttle.fail("ada", now)
        waits.append(throttle.wait("ada", now))
        now += waits[-1]
    assert waits == [0, 1, 2, 4, 8, 16, 32, 60, 60]


def test_nobody_is_locked_out():
    throttle = Throttle(free=0)
    now = guess(throttle, "ada", 500)
    assert throttle.wait("ada", now) == 60
    assert throttle.wait("ada", now + 60) == 0


def test_failures_at_the_same_moment_are_not_free():
    throttle = Throttle(free=2)
    for _ in range(3):
        throttle.fail("ada", 0)
    assert throttle.wait("ada", 0) == 1


def test_success_forgets_the_failures_of_that_name_only():
    throttle = Throttle(free=1)
    guess(throttle, "ada", 2), guess(throttle, "bob", 2)
    throttle.succeed("ada")
    assert throttle.wait("ada", 0) == 0
    assert throttle.wait("bob", 0) == 1


def test_a_quiet_hour_is_forgotten():
    throttle = Throttle(free=1)
    now = guess(throttle, "ada", 9) + FORGET_SECONDS + 1
    throttle.fail("ada", now)
    assert throttle.wait("ada", now) == 0


def test_memory_is_bounded_and_the_quietest_goes_first():
    throttle = Throttle(free=0, size=100)
    throttle.fail("ada", 0)
    for number in range(100):
        throttle.fail(f"name{number}", 0)
    assert throttle.wait("ada", 0) == 0
    assert throttle.wait("name0", 0) == 1


def test_a_network_is_an_ipv4_address_or_a_64():
    assert network_of("192.0.2.7") == "192.0.2.7"
    assert network_of("::ffff:192.0.2.7") == "192.0.2.7"
    assert network_of("2001:db8:1:2:3::4") == network_of("2001:db8:1:2:ffff::1") == "2001:db8:1:2::/64"
    assert network_of("2001:db8:1:3::1") != network_of("2001:db8:1:2::1")
    assert network_of("fe80::1%eth0") == "fe80::/64"
    assert network_of(None) == network_of("unix:") == ""
