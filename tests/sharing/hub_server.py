"""A Hugging Face hub on the loopback interface: as much of it as huggingface_hub uses to push and to load."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_user"
OWNER = "user"  # whose token that is
LARGE = (".safetensors", ".png", "tokenizer.json")  # files that go through LFS
REPOSITORY = r"(?P<repo>[\w.-]+/[\w.-]+)"


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        repositories: by id, `files` (content by name), `private` and the number of `commits`.
        blobs: what was uploaded through LFS, by SHA-256.
        requests: method and path of all requests, in order.
        missing: those of them that there is no route for.
        fails: (method, part of a path) -> (status, message) of requests that are to fail.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.blobs, self.requests, self.missing, self.fails = {}, {}, [], [], {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo_id: str, private: bool = False, **files: bytes) -> dict:
        repository = {"files": dict(files), "private": private, "commits": 1, "branches": {"main"}}
        return self.repositories.setdefault(repo_id, repository)


@contextmanager
def running_hub():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer("GET")

    def do_HEAD(self):
        self.answer("HEAD")

    def do_POST(self):
        self.answer("POST")

    def do_PUT(self):
        self.answer("PUT")

    def answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((method, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.chunks()
        for (failing, part), (status, message) in self.server.fails.items():
            if failing == method and part in path:
                return self.refuse(status, message)
        for routed, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in routed:
                return function(self, body, **match.groupdict())
        self.server.missing.append((method, path))
        return self.refuse(404, f"no route {method} {path}")

    def chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def send(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.pop("length", None) or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, message: str, code: str = "") -> None:
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self.send(status, json.dumps({"error": message}).encode(), Content_Type="application/json", **headers)

    @property
    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def may_write(self, repo: str) -> bool:
        if not self.authorized:
            self.refuse(401, "Invalid username or password.")
        elif not repo.startswith(f"{OWNER}/"):
            self.refuse(403, f'You don\'t have the rights to push to "{repo}"')
        elif repo not in self.server.repositories:
            self.refuse(404, "Repository not found", "RepoNotFound")
        else:
            return True
        return False

    def found(self, repo: str) -> dict | None:
        """Returns a repository that may be read; answers itself where there is none."""
        repository = self.server.repositories.get(repo)
        if repository is None or (repository["private"] and not self.authorized):
            self.refuse(404 if self.authorized else 401, "Repository not found", "RepoNotFound")
            return None
        return repository

    # What the client asks for

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or OWNER}/{asked['name']}"
        if not self.authorized:
            return self.refuse(401, "Invalid username or password.")
        if not repo.startswith(f"{OWNER}/"):
            return self.refuse(403, "You don't have the rights to create a model under this namespace")
        status = 409 if repo in self.server.repositories else 200
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.server.add(repo, private, **{".gitattributes": b""})
        self.send_json({"url": f"{self.server.url}/{repo}", "name": repo, "id": "1"}, status)

    def validate(self, body: bytes) -> None:
        self.send_json({"warnings": [], "errors": []})

    def branch(self, body: bytes, repo: str, revision: str) -> None:
        if self.may_write(repo):
            self.server.repositories[repo]["branches"].add(revision)
            self.send_json({})

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        repository = self.found(repo)
        if repository is None:
            return
        card = re.match(rb"---\n(.*?)\n---", repository["files"].get("README.md", b""), re.DOTALL)
        siblings = [{"rfilename": name, "size": len(content)} for name, content in repository["files"].items()]
        data = dict(re.findall(r"^(license\w*): (.+)$", card[1].decode(), re.MULTILINE)) if card else {}
        self.send_json(
            {
                "_id": "1",
                "id": repo,
                "modelId": repo,
                "sha": self.sha(repository),
                "private": repository["private"],
                "tags": [],
                "siblings": siblings,
                "cardData": data,
            }
        )

    def sha(self, repository: dict) -> str:
        return f"{repository['commits']:040x}"

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if self.may_write(repo):
            modes = {
                file["path"]: "lfs" if file["path"].endswith(LARGE) else "regular"
                for file in json.loads(body)["files"]
            }
            self.send_json(
                {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}
            )

    def lfs_batch(self, body: bytes, repo: str) -> None:
        if self.may_write(repo):
            url = f"{self.server.url}/upload/"
            objects = [
                {**one, "actions": {"upload": {"href": url + one["oid"]}}} for one in json.loads(body)["objects"]
            ]
            self.send_json({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self.send(200)

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if not self.may_write(repo):
            return
        repository = self.server.repositories[repo]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository["files"][value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository["files"][value["path"]]
        repository["commits"] += 1
        sha = self.sha(repository)
        self.send_json({"commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "commitOid": sha})

    def resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        repository = self.found(repo)
        if repository is None:
            return
        if file not in repository["files"]:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        content = repository["files"][file]
        headers = {"X_Repo_Commit": self.sha(repository), "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part is None:
            return self.send(200, content, **headers)
        first, last = int(part[1]), min(int(part[2] or len(content) - 1), len(content) - 1)
        headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
        return self.send(206, content[first : last + 1], **headers)

    def tree(self, body: bytes, repo: str, revision: str, path: str | None) -> None:
        repository = self.found(repo)
        if repository is not None:
            files, start = repository["files"], f"{path}/" if path else ""
            inside = {name: content for name, content in files.items() if name.startswith(start)}
            if path and not inside:
                return self.refuse(404, "Entry not found", "EntryNotFound")
            self.send_json([{"type": "file", "path": n, "size": len(c), "oid": "1"} for n, c in inside.items()])


ROUTES = [
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate),
    (("POST",), rf"/api/models/{REPOSITORY}/branch/(?P<revision>[^/]+)", Handler.branch),
    (("POST",), rf"/api/models/{REPOSITORY}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    (("POST",), rf"/api/models/{REPOSITORY}/commit/(?P<revision>[^/]+)", Handler.commit),
    (("POST",), rf"/{REPOSITORY}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), "/upload/(?P<oid>[0-9a-f]{64})", Handler.upload),
    (("GET",), rf"/api/models/{REPOSITORY}", Handler.info),
    (("GET",), rf"/api/models/{REPOSITORY}/revision/(?P<revision>[^/]+)", Handler.info),
    (("GET",), rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?", Handler.tree),
    (("GET", "HEAD"), rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", Handler.resolve),
]
