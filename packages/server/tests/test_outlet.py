"""Where the parts of an answer go: in order, whatever the connection takes at once."""

import asyncio
import random

import pytest

from octavo_server.outlet import Outlet


class Connection:
    """Takes parts at once while it is not full; `send` waits until it has room."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self.num_waited = 0
        self.room = asyncio.Event()
        self.room.set()
        self.ended = False

    def write_now(self, part: bytes) -> bool:
        if not self.room.is_set():
            return False
        self.taken.append(part)
        return True

    async def send(self, message) -> None:
        self.num_waited += 1
        await self.room.wait()
        assert not self.ended
        self.taken.append(message["body"])
        self.ended = not message["more_body"]


def run(main):
    async def whole():
        async with asyncio.timeout(10):
            await main(Connection())

    asyncio.run(whole())


def test_what_the_connection_takes_is_sent_before_write_returns():
    async def main(connection):
        outlet = Outlet(connection.send, connection.write_now)
        outlet.write(b"a")
        assert connection.taken == [b"a"]
        await outlet.drained()
        await outlet.end(b"z")
        assert (connection.taken, connection.num_waited, connection.ended) == ([b"a", b"z"], 1, True)

    run(main)


def test_parts_that_wait_are_sent_together_and_before_later_ones():
    async def main(connection):
        outlet = Outlet(connection.send, connection.write_now)
        outlet.write(b"a")
        connection.room.clear()
        outlet.write(b"b")
        await asyncio.sleep(0)
        outlet.write(b"c")
        outlet.write(b"d")
        connection.room.set()
        outlet.write(b"e")  # there is room again, but b, c and d come first
        assert connection.taken == [b"a"]
        await outlet.end(b"z")
        assert connection.taken == [b"a", b"b", b"cde", b"z"]

    run(main)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("at_once", [True, False])
def test_nothing_is_lost_or_out_of_order(seed, at_once):
    async def main(connection):
        outlet = Outlet(connection.send, connection.write_now if at_once else None)
        rng = random.Random(seed)
        parts = [bytes([65 + i % 26]) for i in range(100)]
        for part in parts:
            outlet.write(part)
            if rng.random() < 0.3:
                connection.room.clear() if connection.room.is_set() else connection.room.set()
            if rng.random() < 0.3:
                await asyncio.sleep(0)
        connection.room.set()
        await outlet.end()
        assert b"".join(connection.taken) == b"".join(parts)

    run(main)


@pytest.mark.parametrize("steps", range(4))
def test_who_stops_waiting_does_not_stop_what_is_on_its_way(steps):
    async def main(connection):
        outlet = Outlet(connection.send, None)
        connection.room.clear()
        outlet.write(b"a")
        waits = asyncio.create_task(outlet.drained())
        for _ in range(steps):
            await asyncio.sleep(0)
        outlet.write(b"b")
        waits.cancel()
        await asyncio.wait({waits})
        connection.room.set()
        await outlet.end(b"z")
        assert b"".join(connection.taken) == b"abz"

    run(main)


def test_what_was_not_sent_is_dropped_at_close():
    async def main(connection):
        outlet = Outlet(connection.send, connection.write_now)
        connection.room.clear()
        outlet.write(b"a")
        await asyncio.sleep(0)
        outlet.close()
        connection.room.set()
        await outlet.end(b"z")
        assert connection.taken == [b"z"]

    run(main)
