"""A server that speaks what the hub's library asks of the hub."""

import base64
import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN, READER = "hf_writes", "hf_reads"


@dataclass
class Repository:
    """A repository of the hub: the files of each commit, the newest last."""

    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b""}])

    def files(self, revision: str) -> dict[str, bytes] | None:
        names = {f"{number:040x}": files for number, files in enumerate(self.commits)}
        return names.get(sha_of(self) if revision == "main" else revision)


def sha_of(repository: Repository) -> str:
    return f"{len(repository.commits) - 1:040x}"


class Hub(ThreadingHTTPServer):
    """The few addresses of the hub that uploads and downloads ask for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.got: Counter[str] = Counter()
        """How often each file was sent."""
        self.broken: set[str] = set()
        """Files whose sending fails."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: bytes | dict[str, Any] | list[Any] = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def repository(self, name: str) -> Repository | None:
        """Return a repository this token may see, or answer that there is none."""
        found = self.server.repositories.get(name)
        if self.token() not in (TOKEN, READER, ""):
            self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        elif found is None or (found.private and self.token() != TOKEN):
            self.answer(404 if self.token() else 401, X_Error_Code="RepoNotFound")
        else:
            return found
        return None

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        if match := re.fullmatch(r"api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            name, revision = match[1], match[2] or "main"
            if (repository := self.repository(name)) is None:
                return
            if (files := repository.files(revision)) is None:
                self.answer(404, X_Error_Code="RevisionNotFound")
                return
            siblings = [{"rfilename": name} for name in files]
            sha = sha_of(repository) if revision == "main" else revision
            self.answer(200, {"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})
        elif match := re.fullmatch(r"api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            if (repository := self.repository(match[1])) is not None:
                files = repository.files(match[2]) or {}
                self.answer(
                    200,
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in files.items()
                    ],
                )
        elif match := re.fullmatch(r"([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if (repository := self.repository(match[1])) is not None:
                self.send_file(repository, match[2], match[3])
        else:
            self.answer(404)

    do_HEAD = do_GET  # noqa: N815

    def send_file(self, repository: Repository, revision: str, name: str) -> None:
        data = (repository.files(revision) or {}).get(name)
        if data is None:
            self.answer(404, X_Error_Code="EntryNotFound")
            return
        if self.command == "GET":
            if name in self.server.broken:
                self.answer(500)
                return
            self.server.got[name] += 1
        commit = sha_of(repository) if revision == "main" else revision
        self.answer(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=commit)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.split("?")[0].strip("/")
        if self.token() not in (TOKEN, READER):
            self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        elif path == "api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif self.token() == READER:
            self.answer(403, X_Error_Message="this token only reads")
        elif path == "api/repos/create":
            fields = json.loads(body)
            name = f"{fields['organization']}/{fields['name']}"
            exists = name in self.server.repositories
            private = fields.get("private", fields.get("visibility") == "private")
            self.server.repositories.setdefault(name, Repository(private))
            self.answer(409 if exists else 200, {"url": f"{self.server.address}/{name}"})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                if one["oid"] not in self.server.blobs:
                    one["actions"] = {"upload": {"href": f"{self.server.address}/blobs/{one['oid']}"}}
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".bin", ".safetensors", ".model")) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif match := re.fullmatch(r"api/models/([^/]+/[^/]+)/commit/main", path):
            self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.answer(404)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if any(name in self.server.broken for name in ("PUT", self.path)):
            self.answer(400)
            return
        self.server.blobs[self.path.rsplit("/", 1)[-1]] = data
        self.server.got["PUT"] += 1
        self.answer(200)

    def commit(self, name: str, operations: list[dict[str, Any]]) -> None:
        files = dict(self.server.repositories[name].commits[-1])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        self.server.repositories[name].commits.append(files)
        sha = sha_of(self.server.repositories[name])
        self.answer(200, {"commitUrl": f"{self.server.address}/{name}/commit/{sha}", "commitOid": sha})
