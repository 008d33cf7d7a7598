"""What is kept: one process at a time, through migrations and crashes; and how lists are paged."""

import asyncio
import sqlite3

import pytest

from octavo_engine.errors import InvalidConfig, InvalidRequest
from octavo_server.store.batches import BatchLine
from octavo_server.store.database import Database, StoreFailed
from octavo_server.store.files import StoredFile
from octavo_server.store.paging import Page
from octavo_server.store.responses import StoredResponse
from octavo_server.store.schema import MIGRATIONS
from octavo_server.store.store import Store, state_folder


def stored(response_id, previous=None, **members):
    response = {"id": response_id, "created_at": 5, "previous_response_id": previous, "status": "in_progress"}
    return StoredResponse(response | {"output": []} | members, "me", False, False, 0, None)


def item(item_id):
    return {"id": item_id, "type": "message"}


def test_a_folder_serves_one_server_at_a_time(tmp_path):
    with Store(tmp_path / "new" / "state"):
        assert (tmp_path / "new" / "state").stat().st_mode & 0o077 == 0
        with pytest.raises(InvalidConfig, match=r"in use by another server.*--state-dir"):
            Store(tmp_path / "new" / "state")
    Store(tmp_path / "new" / "state").close()


def test_a_folder_that_cannot_be_used_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match=r"cannot keep state in .*--state-dir"):
        Store(tmp_path / "file")
    (tmp_path / "octavo.sqlite3").write_text("no database " * 100)
    with pytest.raises(InvalidConfig, match="not a database"):
        Store(tmp_path)


def test_a_newer_schema_is_refused_and_an_older_one_brought_up(tmp_path):
    Store(tmp_path).close()
    connection = sqlite3.connect(tmp_path / "octavo.sqlite3")
    assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(InvalidConfig, match="its version is 99"):
        Store(tmp_path)


def test_a_transaction_is_whole_or_not_at_all():
    database = Database(None)

    def half(connection):
        connection.execute("INSERT INTO files VALUES (1, 'a', 'o', 1, NULL, 'n', 'batch', 3)")
        raise KeyError

    async def run():
        with pytest.raises(KeyError):
            await database.run(half)
        with pytest.raises(StoreFailed, match="no such table"):
            await database.run(lambda c: c.execute("SELECT * FROM unknown"))
        return await database.run(lambda c: c.execute("SELECT COUNT(*) FROM files").fetchone())

    assert asyncio.run(run()) == (0,)
    database.close()


def test_files_that_are_not_known_are_removed_at_the_start(tmp_path):
    with Store(tmp_path) as store:
        for name in ("known", "half"):
            store.files.path(name).write_bytes(b"abc")
        asyncio.run(store.files.add(StoredFile("known", "me", 1, 10, "a.txt", "batch", 3)))
    with Store(tmp_path) as store:
        assert [path.name for path in (tmp_path / "files").iterdir()] == ["known"]
        asyncio.run(store.files.delete_expired(9))
        assert asyncio.run(store.files.get("known", "me")) is not None
        assert asyncio.run(store.files.get("known", "you")) is None
        asyncio.run(store.files.delete_expired(10))
        assert list((tmp_path / "files").iterdir()) == []
        assert asyncio.run(store.files.get("known", "me")) is None


def test_a_conversation_is_followed_back_to_its_beginning():
    async def run():
        with Store() as store:
            responses = store.responses
            await responses.add(stored("r1"), [item("q1"), item("q2")])
            await responses.update(stored("r1", status="completed", output=[item("a1")]).response)
            await responses.add(stored("r2", "r1"), [item("q3")])
            await responses.update(stored("r2", "r1", status="completed", output=[item("a2")]).response)
            assert [i["id"] for i in await responses.conversation("r2", "me")] == ["q1", "q2", "a1", "q3", "a2"]
            assert [i["id"] for i in await responses.inputs("r2", "me")] == ["q1", "q2", "a1", "q3"]
            assert await responses.item("a1", "me") == item("a1")
            assert await responses.item("a1", "you") is None
            await responses.delete_older(6)
            assert await responses.get("r2", "me") is None  # nothing goes on from it
            assert await responses.get("r1", "me") is not None
            await responses.add(stored("r3", "r1"), [])
            with pytest.raises(InvalidRequest, match="r3 has not ended"):
                await responses.conversation("r3", "me")
            await responses.add(stored("r4", "r1", status="failed"), [])
            await responses.add_events("r1", [(0, b"a")])
            assert await responses.delete("r1", "me")
            await responses.add_events("r1", [(1, b"b")])
            assert await responses.events("r1", -1) == []
            left = await responses._database.run(lambda c: c.execute("SELECT id FROM items ORDER BY id").fetchall())
            assert left == []
            with pytest.raises(InvalidRequest, match="no response 'r1' is stored"):
                await responses.conversation("r4", "me")
            await responses.delete_older(6)
            assert await responses.get("r3", "me") is not None  # it is at work

    asyncio.run(run())


def test_what_has_come_of_a_line_is_written_once():
    async def run():
        with Store() as store:
            batches = store.batches
            await batches.add({"id": "b1", "input_file_id": "f1"}, "me", 10)
            await batches.add_lines("b1", [BatchLine(1, "a", 0, 5), BatchLine(2, "b", 5, 5)])
            await batches.start("b1")
            await batches.finish_line("b1", 1, succeeded=True, result="first")
            await batches.finish_line("b1", 1, succeeded=False, result="second")
            batch = await batches.get("b1", "me")
            assert (batch.num_lines, batch.num_completed, batch.num_failed) == (2, 1, 0)
            (done,) = await batches.results("b1", succeeded=True, after=0, limit=9)
            assert done.result == "first"
            assert [line.line for line in await batches.pending_lines("b1", after=0, limit=9)] == [2]
            _, is_new = await batches.cancel("b1", at=5)
            assert is_new
            assert not (await batches.cancel("b1", at=6))[1]
            assert (await batches.update("b1", outcome="completed")).outcome == "cancelled"
            await batches.end("b1", [StoredFile("f2", "me", 1, None, "n", "batch_output", 3)], status="cancelled")
            await batches.end("b1", [StoredFile("f3", "me", 1, None, "n", "batch_output", 3)], status="completed")
            assert (await batches.get("b1", "me")).batch["status"] == "cancelled"
            assert await store.files.get("f3", "me") is None
            assert await batches.unfinished() == []

    asyncio.run(run())


@pytest.mark.parametrize(
    ("query", "expected", "has_more"),
    [
        ({}, "cb", True),
        ({"after": "b"}, "a", False),
        ({"order": "asc"}, "ab", True),
        ({"order": "asc", "after": "a", "limit": "1"}, "b", True),
        ({"limit": "3"}, "cba", False),
    ],
    ids=str,
)
def test_pages(query, expected, has_more):
    page = Page.of(query, limit=2, max_limit=10)
    part, more = page.part([{"id": name} for name in "abc"])
    assert ("".join(thing["id"] for thing in part), more) == (expected, has_more)
    database = Database(None)
    for name in "abc":
        sql = "INSERT INTO files (id, owner, created_at, filename, purpose, num_bytes) VALUES (?, 'o', 1, '', '', 0)"
        database.run_now(lambda c, name=name, sql=sql: c.execute(sql, (name,)))
    rows, more = database.run_now(lambda c: page.rows(c, "id", "files", {"owner": "o"}))
    assert ("".join(row[0] for row in rows), more) == (expected, has_more)
    database.close()


@pytest.mark.parametrize("query", [{"limit": "0"}, {"limit": "x"}, {"limit": "99"}, {"order": "up"}], ids=str)
def test_a_page_that_is_none_is_refused(query):
    with pytest.raises(InvalidRequest) as refusal:
        Page.of(query, limit=2, max_limit=10)
    assert refusal.value.param == next(iter(query))


def test_where_state_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_folder(None, "8000") == tmp_path / "octavo" / "8000"
    assert state_folder(None, None) is None
    assert state_folder(":memory:", "8000") is None
    assert state_folder(str(tmp_path / "x"), None) == tmp_path / "x"
