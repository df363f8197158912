"""A Hugging Face Hub on this machine: enough of its API for `datasets` to find, stream and download data sets.

Every folder OWNER/NAME below a root is a repository. A program reaches it through the variables of environment().
"""

import hashlib
import http.server
import json
import os
import re
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves the repositories below root until the end of the with statement; `asked` holds the paths of all requests.

    revisions: the folder that replaces a repository's at a revision other than COMMIT and main, by (name, revision).
    gated: names of repositories that need a login. After `max_reads` reads of data files the server fails.
    """

    def __init__(self, root, commit: str = COMMIT):
        self.root, self.commit, self.asked = str(root), commit, []
        self.revisions: dict[tuple[str, str], str] = {}
        self.gated: set[str] = set()
        self.max_reads, self.n_reads = 10**9, 0
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache) -> dict[str, str]:
        """Variables with which a program asks this Hub and keeps its cache in a folder."""
        url = f"http://127.0.0.1:{self.server.server_address[1]}"
        return {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def data_reads(self) -> list[str]:
        """The data files that were read, once per read."""
        return [path for path in self.asked if "/resolve/" in path and path.endswith((".parquet", ".jsonl"))]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *args):
        pass

    def answer(self, status: int, content: bytes | list | dict = b"", **headers: str):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        self.respond(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def do_GET(self):
        self.respond(b"")

    do_HEAD = do_GET

    def respond(self, body: bytes):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.hub.asked.append(path)
        match = re.fullmatch(r"(/api)?/datasets/([^/]+/[^/]+)/?(.*)", path)
        if not match or not os.path.isdir(os.path.join(self.hub.root, match[2])):
            return self.answer(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if match[2] in self.hub.gated:
            return self.answer(401, {"error": "Access is restricted"}, X_Error_Code="GatedRepo")
        if match[1]:
            return self.respond_api(match[2], match[3], body)
        _, revision, name = match[3].split("/", 2) if not match[3].startswith("resolve/refs/") else self.parts(match[3])
        self.respond_file(self.folder(match[2], revision), name)

    @staticmethod
    def parts(rest: str) -> tuple[str, str, str]:
        """resolve/refs/convert/parquet/FILE -> (resolve, refs/convert/parquet, FILE)."""
        command, *revision, name = rest.split("/", 4)
        return command, "/".join(revision), name

    def folder(self, repository: str, revision: str) -> str:
        return self.hub.revisions.get((repository, revision), os.path.join(self.hub.root, repository))

    def respond_api(self, repository: str, rest: str, body: bytes):
        command, _, rest = rest.partition("/")
        revision = next((r for (_, r) in self.hub.revisions if rest.startswith(r)), rest.partition("/")[0])
        folder, below = self.folder(repository, revision), rest[len(revision) + 1 :]
        commit = revision if (repository, revision) in self.hub.revisions else self.hub.commit
        commit = hashlib.sha1(commit.encode()).hexdigest() if "/" in commit else commit
        if command in ("", "revision"):
            self.hub.revisions.setdefault((repository, commit), folder)
            return self.answer(200, {"id": repository, "sha": commit, "siblings": []})
        names = [os.path.relpath(os.path.join(d, f), folder) for d, _, fs in os.walk(folder) for f in fs]
        entries = {name: os.path.getsize(os.path.join(folder, name)) for name in sorted(names)}
        if command == "paths-info":
            asked = urllib.parse.parse_qs(body.decode()) if b"=" in body else json.loads(body)
            entries = {name: size for name, size in entries.items() if name in asked["paths"]}
        elif entries := self.below(entries, below):
            is_recursive = "recursive=true" in self.path.lower()
            entries = entries if is_recursive else self.level(entries, below)
        if not entries and command == "tree" and below:
            return self.answer(404, {"error": "no such entry"}, X_Error_Code="EntryNotFound")
        kinds = {name: "file" if size >= 0 else "directory" for name, size in entries.items()}
        self.answer(200, [{"type": kinds[n], "path": n, "size": max(0, size), "oid": n} for n, size in entries.items()])

    @staticmethod
    def below(entries: dict[str, int], folder: str) -> dict[str, int]:
        """The files in a folder and in those below it."""
        return {name: size for name, size in entries.items() if not folder or name.startswith(folder + "/")}

    @staticmethod
    def level(entries: dict[str, int], folder: str) -> dict[str, int]:
        """The files directly in a folder, and its folders, whose size is -1."""
        depth = len(folder.split("/")) + 1 if folder else 1
        folders = {"/".join(name.split("/")[:depth]): -1 for name in entries}
        return {**folders, **{name: size for name, size in entries.items() if name.count("/") == depth - 1}}

    def respond_file(self, folder: str, name: str):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.hub.commit)
        with open(path, "rb") as file:
            content = file.read()
        if self.command == "GET" and name.endswith((".parquet", ".jsonl")):
            self.hub.n_reads += 1
            if self.hub.n_reads > self.hub.max_reads:
                return self.answer(503)
        tag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": self.hub.commit}
        if part := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            where = f"bytes {start}-{end}/{len(content)}"
            return self.answer(206, content[start : end + 1], Content_Range=where, **tag)
        self.answer(200, content, Accept_Ranges="bytes", **tag)
