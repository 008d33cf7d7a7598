"""Files: uploads that go to the disk, lists, contents, ends; and what is refused."""

import openai
import pytest
from openai.types import FileObject

from octavo_server.uploads import FORM_BYTES

FILES = "/v1/files"


def upload(client, content=b"abc", purpose="user_data", name="a.txt", **fields):
    data = {"purpose": purpose, **fields} if purpose else fields
    return client.post(FILES, files={"file": (name, content)}, data=data)


def test_a_file_is_kept_shown_and_deleted(client):
    file = upload(client, b"a\x00\r\n" * 1000).json()
    FileObject.model_validate(file)
    assert {name: file[name] for name in ("object", "bytes", "filename", "purpose", "status", "expires_at")} == {
        "object": "file",
        "bytes": 4000,
        "filename": "a.txt",
        "purpose": "user_data",
        "status": "processed",
        "expires_at": None,
    }
    path = f"{FILES}/{file['id']}"
    assert client.get(path).json() == file
    content = client.get(f"{path}/content")
    assert content.content == b"a\x00\r\n" * 1000
    assert 'filename="a.txt"' in content.headers["content-disposition"]
    stored = client.app.state.durable.store.files.path(file["id"])
    assert stored.exists()
    assert client.delete(path).json() == {"id": file["id"], "object": "file", "deleted": True}
    assert not stored.exists()
    for method, suffix in [("GET", ""), ("GET", "/content"), ("DELETE", "")]:
        response = client.request(method, path + suffix)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "file_not_found")


def test_files_are_listed_newest_first_by_purpose_and_by_owner(make_client, engine):
    client = make_client(engine, api_keys=("one", "two"))
    client.headers["authorization"] = "Bearer one"
    ids = [upload(client, purpose=purpose).json()["id"] for purpose in ("batch", "user_data", "batch")]
    assert [file["id"] for file in client.get(FILES).json()["data"]] == ids[::-1]
    assert [file["id"] for file in client.get(FILES, params={"purpose": "batch"}).json()["data"]] == ids[::-2]
    page = client.get(FILES, params={"limit": 2, "order": "asc"}).json()
    assert ([file["id"] for file in page["data"]], page["has_more"]) == (ids[:2], True)
    client.headers["authorization"] = "Bearer two"
    assert client.get(FILES).json() == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }
    assert client.get(f"{FILES}/{ids[0]}").status_code == 404
    assert client.get(FILES, params={"after": ids[0]}).status_code == 400


def test_files_may_have_an_end(client):
    batch = upload(client, purpose="batch").json()
    assert batch["expires_at"] == batch["created_at"] + 30 * 24 * 3600
    expiry = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    file = upload(client, **expiry).json()
    assert file["expires_at"] == file["created_at"] + 3600


BOUNDARY = {"content-type": "multipart/form-data; boundary=b"}
PART = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\nabc'
REFUSED = {
    "no form": ({"json": {}}, 415, "unsupported_media_type"),
    "no boundary": ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 415, None),
    "no file": ({"files": {"purpose": (None, "batch")}}, 400, None),
    "another name": ({"files": {"upload": ("a", b"x")}, "data": {"purpose": "batch"}}, 400, None),
    "two files": ({"files": [("file", ("a", b"x")), ("file", ("b", b"x"))]}, 400, None),
    "no purpose": ({"files": {"file": ("a", b"x")}}, 400, None),
    "an unknown purpose": ({"files": {"file": ("a", b"x")}, "data": {"purpose": "fun"}}, 400, None),
    "a long field": ({"files": {"file": ("a", b"x")}, "data": {"purpose": "x" * 5000}}, 400, None),
    "many fields": ({"files": {"file": ("a", b"x")}, "data": {f"f{i}": "" for i in range(20)}}, 400, None),
    "a wrong end": (
        {"files": {"file": ("a", b"x")}, "data": {"purpose": "batch", "expires_after[seconds]": "10"}},
        400,
        None,
    ),
    "a form cut off": ({"content": PART, "headers": BOUNDARY}, 400, None),
    "a long boundary": (
        {"content": b"x", "headers": {"content-type": f"{BOUNDARY['content-type']}{'b' * 300}"}},
        400,
        None,
    ),
    "a broken form": ({"content": b"--c\r\n", "headers": BOUNDARY}, 400, None),
    "too large": ({"files": {"file": ("a", b"x" * 2000)}, "data": {"purpose": "batch"}}, 413, "file_too_large"),
    "far too large": ({"files": {"file": ("a", b"x" * 2 * FORM_BYTES)}}, 413, "body_too_large"),
}


@pytest.mark.parametrize(("request_", "status", "code"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_taken_leaves_nothing(make_client, engine, request_, status, code):
    client = make_client(engine, max_file_bytes=1000)
    response = client.post(FILES, **request_)
    assert response.status_code == status, response.text
    assert code is None or response.json()["error"]["code"] == code
    files = client.app.state.durable.store.files
    assert list(files.path("x").parent.iterdir()) == []
    assert client.get(FILES).json()["data"] == []


def test_the_disk_is_not_filled(make_client, engine):
    client = make_client(engine, max_stored_bytes=1000)
    file = upload(client, b"x" * 1000).json()
    response = upload(client)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "storage_full")
    client.delete(f"{FILES}/{file['id']}")
    assert upload(client).status_code == 200


def test_the_sdk_uploads_more_than_a_body_may_have(engine, serve):
    content = bytes(range(256)) * 8192
    with openai.OpenAI(base_url=serve(engine, max_body_bytes=1000) + "/v1", api_key="none", max_retries=0) as client:
        file = client.files.create(
            file=("a.bin", content), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert file.bytes == len(content) == 2 << 20
        assert client.files.content(file.id).read() == content
        assert [f.id for f in client.files.list()] == [file.id]
        assert client.files.retrieve(file.id) == file
        assert client.files.delete(file.id).deleted
