"""
A Hub on this machine: what `huggingface_hub` 1.x and 2.x ask huggingface.co about model repositories.

    with Hub() as hub:
        hub.faults.append(Fault("GET", "me/hivilt/resolve/.*safetensors", cut=1000))
        ...  # processes whose environment has hub.environment()
        assert hub.requests("GET", "safetensors")[1].range == "bytes=1000-"

It speaks: whoami, creating a repository, validation of a card, preupload, LFS batch, upload and verification, commits,
branches, tags, history, trees, information about a model, and files by revision with ETag and ranges. Repositories have
a real history: a commit has an id made of its content and a table of its own of all files; a revision is a branch, a
tag or the id of a commit. Errors are those of huggingface.co, with its statuses and `X-Error-Code`.

It leaves out: data sets and Spaces, pull requests, gated repositories, organizations, renaming and deletion, pages of
long lists, several parts of one upload, Xet storage, and the redirect of large files to other hosts.

The server also poses as the proxy to everywhere else: what a client asks of another host ends up in `hub.outside`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LARGEST_REGULAR_FILE = 10 * 1024**2
REPO, REVISION = "(?P<repo>[^/]+/[^/]+)", "(?P<revision>[^/]+)"
FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---", re.DOTALL)


@dataclass(frozen=True)
class Blob:
    """A version of a file."""

    content: bytes
    is_large: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def git_id(self) -> str:
        return hashlib.sha1(b"blob %d\0%s" % (len(self.content), self.content)).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.git_id

    def lfs(self, id_name: str) -> dict[str, Any]:
        """What an answer adds for a large file, whose SHA-256 some answers call "oid" and others "sha256"."""
        about = {id_name: self.sha256, "size": len(self.content), "pointerSize": 134}
        return {"lfs": about} if self.is_large else {}


@dataclass(frozen=True)
class Commit:
    """A state of all files, by path."""

    parent: str | None
    title: str
    message: str
    date: str
    files: dict[str, Blob]

    @cached_property
    def id(self) -> str:
        table = {path: blob.git_id for path, blob in sorted(self.files.items())}
        content = [self.parent, self.title, self.message, self.date, table]
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


class Repository:
    """Commits, and the names that point to them."""

    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.commit("main", "initial commit", "", {".gitattributes": Blob(GIT_ATTRIBUTES, False)})

    def commit(self, branch: str, title: str, message: str, files: dict[str, Blob]) -> Commit:
        # No clock: the same history has the same ids in every run.
        date = datetime(2025, 1, 1, tzinfo=UTC) + timedelta(minutes=len(self.commits))
        commit = Commit(self.branches.get(branch), title, message, date.strftime("%Y-%m-%dT%H:%M:%S.000Z"), files)
        self.commits[commit.id] = commit
        self.branches[branch] = commit.id
        return commit

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)

    def history(self, revision: str = "main") -> list[Commit]:
        """The commit that a revision names and all before it, the newest first."""
        commits = [self.find(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits


@dataclass
class Request:
    """What was asked, and the status of the answer."""

    method: str
    path: str
    range: str | None
    status: int = 0


@dataclass
class Fault:
    """Something that goes wrong with the next requests of this method whose path holds a match of this expression.

    Args:
        status: answered in place of what was asked for.
        cut: the connection closes after so many bytes of the file.
        times: how many requests are to suffer.
    """

    method: str
    path: str
    status: int | None = None
    cut: int | None = None
    times: int = 1


@dataclass(repr=False)
class Hub:
    """The server and all it knows; it runs within a `with` statement."""

    tokens: dict[str, str] = field(default_factory=lambda: {"hf_loopback": "me"})  # and whose they are
    repositories: dict[str, Repository] = field(default_factory=dict)
    large_files: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    announced: dict[str, int] = field(default_factory=dict)  # large files to come: SHA-256, size
    faults: list[Fault] = field(default_factory=list)
    log: list[Request] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)  # what was asked of other hosts
    on_request: Callable[[Request], None] = lambda request: None  # called before a request is answered
    lock: Any = field(default_factory=threading.RLock)

    def __enter__(self) -> "Hub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self) -> dict[str, str]:
        """Variables for a client's process: it asks this Hub, and reaches nothing else."""
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), self.url)
        proxies |= {name.lower(): self.url for name in proxies} | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        # On a machine with much else to do an answer may take longer than a client waits by default.
        patient = {"HF_HUB_ETAG_TIMEOUT": "300", "HF_HUB_DOWNLOAD_TIMEOUT": "300"}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return {"HF_ENDPOINT": self.url, **proxies, **patient, **quiet}

    def requests(self, method: str, path: str) -> list[Request]:
        """What has been asked with this method and a path that holds a match of this expression, in order."""
        return [one for one in self.log if one.method == method and re.search(path, one.path)]

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository, by path."""
        return {path: blob.content for path, blob in self.repositories[repo].find(revision).files.items()}


class _Refusal(Exception):
    """An answer that is an error, in the words of huggingface.co."""

    def __init__(self, status: int, message: str, code: str | None = None, **content: Any):
        self.status, self.content = status, {"error": message, **content}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


def _read_card(content: str) -> dict[str, Any]:
    """The front matter of a README.md; empty if there is none."""
    found, wrong = FRONT_MATTER.match(content), []
    try:
        card = (found and yaml.safe_load(found[1])) or {}
        names = ("license", "pipeline_tag", "library_name")
        wrong = [f'"{name}" must be a string' for name in names if not isinstance(card.get(name, ""), str)]
    except (yaml.YAMLError, AttributeError) as error:
        wrong = [f"no YAML mapping: {error}"]
    if wrong:
        raise _Refusal(400, "Invalid card", errors=[{"message": message} for message in wrong], warnings=[])
    return card


class _Handler(BaseHTTPRequestHandler):
    """Answers one request after another of a connection."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 900

    def answer(self) -> None:
        """Does what the table says; what comes of it is a file, or goes out as JSON."""
        body, url = self.rfile.read(int(self.headers["Content-Length"] or 0)), urlsplit(self.path)
        self.asked = Request(self.command, unquote(url.path), self.headers["Range"])
        self.body, self.query, self.commit_id, self.cut = body, parse_qs(url.query), None, None
        if not self.path.startswith("/"):
            self.hub.outside.append(f"{self.command} {self.path}")
            return self.send(403, b"Tests stay on this machine.")
        headers = {"Content-Type": "application/json"}
        with self.hub.lock:
            self.hub.log.append(self.asked)
            self.hub.on_request(self.asked)
            try:
                self.suffer()
                self.user = self.authenticate()
                status, content = 200, self.act(url.path)
            except _Refusal as refusal:
                status, content, headers = refusal.status, refusal.content, headers | refusal.headers
        headers |= {"X-Repo-Commit": self.commit_id} if self.commit_id else {}
        if isinstance(content, Blob):
            return self.send_file(content, headers)
        return self.send(status, json.dumps(content).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_CONNECT = answer

    def act(self, path: str) -> Any:
        for method, pattern, function in TABLE:
            found = re.fullmatch(pattern, path)
            if found and method == self.command:
                return function(self, **{name: part and unquote(part) for name, part in found.groupdict().items()})
        raise _Refusal(404, f"This Hub has no {self.command} {path}")

    def suffer(self) -> None:
        """What the first fault has in store for this request."""
        for fault in self.hub.faults:
            if fault.times > 0 and fault.method == self.command and re.search(fault.path, self.asked.path):
                fault.times -= 1
                self.cut = fault.cut
                if fault.status is not None:
                    raise _Refusal(fault.status, "A test asked for this.")
                return

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.asked.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: self.cut])
        if self.cut is not None or not self.path.startswith("/"):
            self.close_connection = True

    def send_file(self, blob: Blob, headers: dict[str, str]) -> None:
        size = len(blob.content)
        headers |= {"Content-Type": "application/octet-stream", "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": f'"{blob.etag}"'} if blob.is_large else {}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.asked.range or "")
        if wanted is None:
            return self.send(200, blob.content, headers)
        start, end = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
        if start > end:
            return self.send(416, b"", headers | {"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        return self.send(206, blob.content[start : end + 1], headers)

    def log_message(self, *args) -> None:
        """Says nothing; `Hub.log` has it all."""

    # Who may what

    def authenticate(self) -> str | None:
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def repository(self, repo: str, writing: bool = False) -> Repository:
        found, is_owner = self.hub.repositories.get(repo), repo.split("/")[0] == self.user
        if self.user is None and (found is None or found.private or writing):
            raise _Refusal(401, "Invalid username or password.", "RepoNotFound")
        if found is None or (found.private and not is_owner):
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        if writing and not is_owner:
            raise _Refusal(403, f"Forbidden: {self.user} may not write to {repo}")
        return found

    def find(self, repo: str, revision: str, writing: bool = False) -> Commit:
        commit = self.repository(repo, writing).find(revision)
        if commit is None:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        self.commit_id = commit.id
        return commit

    # What the table names

    def whoami(self) -> dict:
        if self.user is None:
            raise _Refusal(401, "Invalid username or password.")
        return {"type": "user", "id": self.user, "name": self.user, "fullname": self.user, "orgs": []}

    def create(self) -> dict:
        asked, user = json.loads(self.body), self.whoami()["name"]
        repo = f"{asked.get('organization') or user}/{asked['name']}"
        url = f"{self.hub.url}/{repo}"
        if not repo.startswith(f"{user}/"):
            raise _Refusal(403, f"You don't have the rights to create a model under the namespace of {repo}")
        if repo in self.hub.repositories:
            raise _Refusal(409, "You already created this model repo", url=url)
        # huggingface_hub 1.x and 2.x say it in different words.
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repositories[repo] = Repository(private)
        return {"url": url, "name": repo}

    def validate(self) -> dict:
        card = _read_card(json.loads(self.body)["content"])
        return {"errors": [], "warnings": [] if card else [{"message": "empty or missing yaml metadata in repo card"}]}

    def preupload(self, repo: str, revision: str) -> dict:
        present, answers = self.find(repo, revision, writing=True).files, []
        for file in json.loads(self.body)["files"]:
            is_large = b"\0" in base64.b64decode(file["sample"]) or file["size"] > LARGEST_REGULAR_FILE
            answer = {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            answers.append(answer | {"oid": present[file["path"]].etag if file["path"] in present else None})
        return {"files": answers}

    def announce(self, repo: str) -> dict:
        self.repository(repo, writing=True)
        objects = [{"oid": one["oid"], "size": one["size"]} for one in json.loads(self.body)["objects"]]
        for one in objects:
            if one["oid"] not in self.hub.large_files:
                self.hub.announced[one["oid"]] = one["size"]
                there = f"{self.hub.url}/{repo}.git/lfs"
                one["actions"] = {"upload": {"href": f"{there}/{one['oid']}"}, "verify": {"href": f"{there}/verify"}}
        return {"transfer": "basic", "objects": objects}

    def upload(self, repo: str, sha256: str) -> dict:
        """Asks for no token, as the signed addresses of huggingface.co do not."""
        found = hashlib.sha256(self.body).hexdigest(), len(self.body)
        if found != (sha256, self.hub.announced.get(sha256)):
            raise _Refusal(400, "The content is not what was announced")
        self.hub.large_files[sha256] = self.body
        return {}

    def verify(self, repo: str) -> dict:
        self.repository(repo, writing=True)
        asked = json.loads(self.body)
        if len(self.hub.large_files.get(asked["oid"], b"")) != asked["size"]:
            raise _Refusal(404, "The object is not there")
        return {}

    def commit(self, repo: str, revision: str) -> dict:
        files = dict(self.find(repo, revision, writing=True).files)
        (_, header), *operations = [(line["key"], line["value"]) for line in map(json.loads, self.body.splitlines())]
        if revision not in self.hub.repositories[repo].branches:
            raise _Refusal(400, f"{revision} is not a branch")
        if header.get("parentCommit", self.commit_id) != self.commit_id:
            raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
        for kind, value in operations:
            path = value["path"]
            if kind == "file":
                files[path] = Blob(base64.b64decode(value["content"]), is_large=False)
            elif kind == "lfsFile" and value["oid"] in self.hub.large_files:
                files[path] = Blob(self.hub.large_files[value["oid"]], is_large=True)
            elif kind == "deletedFile" and path in files:
                del files[path]
            elif kind == "deletedFolder":
                files = {other: blob for other, blob in files.items() if not other.startswith(f"{path.rstrip('/')}/")}
            else:
                raise _Refusal(400, f"{path}: no such {kind}")
        done = self.hub.repositories[repo].commit(revision, header["summary"], header.get("description", ""), files)
        return {"success": True, "commitOid": done.id, "commitUrl": f"{self.hub.url}/{repo}/commit/{done.id}"}

    def branch(self, repo: str, branch: str) -> dict:
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        return self.point(self.repository(repo, writing=True).branches, branch, self.find(repo, start))

    def tag(self, repo: str, revision: str) -> dict:
        tags = self.repository(repo, writing=True).tags
        return self.point(tags, json.loads(self.body)["tag"], self.find(repo, revision))

    def point(self, references: dict[str, str], name: str, commit: Commit) -> dict:
        if name in references:
            raise _Refusal(409, f"Reference already exists: {name}")
        references[name] = commit.id
        return {}

    def refs(self, repo: str) -> dict:
        def listed(references: dict[str, str], kind: str) -> list[dict]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": id} for name, id in references.items()]

        found = self.repository(repo)
        return {"branches": listed(found.branches, "heads"), "tags": listed(found.tags, "tags"), "converts": []}

    def commits(self, repo: str, revision: str) -> list:
        history = self.repository(repo).history(self.find(repo, revision).id)
        about = {"authors": [{"user": repo.split("/")[0]}]}
        return [about | {"id": one.id, "title": one.title, "message": one.message, "date": one.date} for one in history]

    def tree(self, repo: str, revision: str, folder: str | None) -> list:
        start = f"{folder}/" if folder else ""
        files = {path: blob for path, blob in self.find(repo, revision).files.items() if path.startswith(start)}
        if not files:
            raise _Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        slashes = ((path, slash.start()) for path in files for slash in re.finditer("/", path))
        folders = {path[:end] for path, end in slashes if end >= len(start)}
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        entries += [self.entry(path, blob) for path, blob in sorted(files.items())]
        recursive = self.query.get("recursive", [""])[0].lower() in ("true", "1")
        return [one for one in entries if recursive or "/" not in one["path"].removeprefix(start)]

    def paths(self, repo: str, revision: str) -> list:
        files, asked = self.find(repo, revision).files, parse_qs(self.body.decode())["paths"]
        return [self.entry(path, files[path]) for path in asked if path in files]

    @staticmethod
    def entry(path: str, blob: Blob) -> dict:
        return {"type": "file", "path": path, "size": len(blob.content), "oid": blob.git_id, **blob.lfs("oid")}

    def model(self, repo: str, revision: str | None) -> dict:
        commit, repository = self.find(repo, revision or "main"), self.hub.repositories[repo]
        card = _read_card(commit.files["README.md"].content.decode()) if "README.md" in commit.files else {}
        named = {name: card[name] for name in ("pipeline_tag", "library_name") if name in card}
        siblings = [
            {"rfilename": path, "blobId": blob.git_id, "size": len(blob.content), **blob.lfs("sha256")}
            for path, blob in sorted(commit.files.items())
        ]
        return {
            **{"id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": commit.id, "cardData": card, **named},
            **{"private": repository.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0},
            **{"lastModified": commit.date, "createdAt": repository.history()[-1].date, "siblings": siblings},
            "tags": [*named.values(), *(card.get("tags") or [])],
        }

    def resolve(self, repo: str, revision: str, path: str) -> Blob:
        files = self.find(repo, revision).files
        if path not in files:
            raise _Refusal(404, "Entry not found", "EntryNotFound")
        return files[path]


# A method, a path, and what answers it.
TABLE = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", _Handler.preupload),
    ("POST", f"/{REPO}.git/info/lfs/objects/batch", _Handler.announce),
    ("PUT", f"/{REPO}.git/lfs/(?P<sha256>[0-9a-f]{{64}})", _Handler.upload),
    ("POST", f"/{REPO}.git/lfs/verify", _Handler.verify),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", _Handler.commit),
    ("POST", f"/api/models/{REPO}/branch/(?P<branch>[^/]+)", _Handler.branch),
    ("POST", f"/api/models/{REPO}/tag/{REVISION}", _Handler.tag),
    ("GET", f"/api/models/{REPO}/refs", _Handler.refs),
    ("GET", f"/api/models/{REPO}/commits/{REVISION}", _Handler.commits),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}(/(?P<folder>.+))?", _Handler.tree),
    ("POST", f"/api/models/{REPO}/paths-info/{REVISION}", _Handler.paths),
    ("GET", f"/api/models/{REPO}(/revision/{REVISION})?", _Handler.model),
    ("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", _Handler.resolve),
    ("HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", _Handler.resolve),
)
