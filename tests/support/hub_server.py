"""A server on this machine that speaks as much of the model hub's protocol as its clients use.

Repository listings, HEAD and GET of files with entity tags, ranges. `Hub(repos)` serves
{'owner/name': folder}; `.packs` holds archives by name, below the address `.pack_url`. `.faults` is a list of
functions (path, method) -> None, an HTTP status, ('cut', bytes), ('slow', seconds a piece), ('wrong',) for
zeros or ('whole',) for a server that knows no ranges, asked in turn for every file.
"""
import contextlib
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    def __init__(self, repos, token=None):
        self.repos, self.token = {k: Path(v) for k, v in repos.items()}, token
        self.faults, self.asked, self.packs = [], [], {}
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), handler_for(self))
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        self.pack_url = f'{self.url}/packs'
        threading.Thread(target=self.server.serve_forever, args=(.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
    def __enter__(self): return self
    def __exit__(self, *exc): self.close()

    def files(self, repo):
        return sorted(str(p.relative_to(self.repos[repo]))
                      for p in self.repos[repo].rglob('*') if p.is_file())
    def sha(self, repo): return hashlib.sha1(repo.encode()).hexdigest()
    def etag(self, file): return hashlib.sha256(file.read_bytes()).hexdigest()
    def fault(self, path, method): return next(filter(None, (f(path, method) for f in self.faults)), None)

    def answer(self, reply):
        "What every request gets."
        self.asked.append((reply.command, reply.asked, reply.headers.get('Range')))
        if self.token and reply.headers.get('Authorization') != f'Bearer {self.token}': return reply.gated()
        parts = reply.asked.split('/')
        if parts[:2] == ['api', 'models']:
            return self.listing(reply, '/'.join(parts[2:4]), 'tree' in parts[4:5])
        if len(parts) > 4 and parts[2] == 'resolve':
            return self.file(reply, '/'.join(parts[:2]), '/'.join(parts[4:]))
        if parts[0] == 'packs': return self.pack(reply, '/'.join(parts[1:]))
        reply.say(404, {'error': f'no such page: {reply.asked}'})

    def listing(self, reply, repo, tree):
        "Which files a repository has."
        if repo not in self.repos: return reply.no_repository()
        if tree: return reply.say(200, [self.entry(repo, f) for f in self.files(repo)])
        reply.say(200, dict(
            _id='0', id=repo, modelId=repo, sha=self.sha(repo), private=False, tags=[], downloads=0,
            siblings=[dict(rfilename=f) for f in self.files(repo)]))

    def entry(self, repo, name):
        file = self.repos[repo]/name
        return dict(type='file', path=name, size=file.stat().st_size, oid=self.etag(file))

    def file(self, reply, repo, name):
        fault = self.fault(f'{repo}/{name}', reply.command)
        if isinstance(fault, int): return reply.say(fault, {'error': 'fault'})
        if repo not in self.repos: return reply.no_repository()
        commit = {'X-Repo-Commit': self.sha(repo)}
        if name not in self.files(repo):
            return reply.say(404, {'error': 'Entry not found'}, {'X-Error-Code': 'EntryNotFound', **commit})
        path = self.repos[repo]/name
        reply.send(path.read_bytes(), fault, {'ETag': f'"{self.etag(path)}"', **commit})

    def pack(self, reply, name):
        fault = self.fault(f'packs/{name}', reply.command)
        if isinstance(fault, int): return reply.say(fault, {'error': 'fault'})
        if name not in self.packs: return reply.say(404, {'error': 'fault'})
        reply.send(self.packs[name], fault, {})


class Reply(BaseHTTPRequestHandler):
    "How answers look on the wire."
    protocol_version = 'HTTP/1.1'
    def log_message(self, *a): pass
    @property
    def asked(self): return unquote(urlsplit(self.path).path).strip('/')

    def head(self, status, headers):
        self.send_response(status)
        for k, v in headers.items(): self.send_header(k, v)
        self.end_headers()

    def say(self, status, what, headers=None):
        body = json.dumps(what).encode()
        plain = {'Content-Type': 'application/json', 'Content-Length': str(len(body))}
        self.head(status, plain | (headers or {}))
        if self.command != 'HEAD': self.wfile.write(body)

    def gated(self):
        why = {'X-Error-Code': 'GatedRepo', 'X-Error-Message': 'Access to this model is restricted.'}
        self.say(401, {'error': 'Invalid username or password.'}, why)

    def no_repository(self):
        self.say(404, {'error': 'Repository not found'}, {'X-Error-Code': 'RepoNotFound'})

    def start(self, fault):
        "Where a range begins; 0 where none was asked for, or the server knows none."
        r = self.headers.get('Range', '')
        if not r.startswith('bytes=') or (fault and fault[0] == 'whole'): return 0
        return int(r[6:].split('-')[0] or 0)

    def send(self, data, fault, headers):
        "A file, or what the fault makes of it."
        start = self.start(fault)
        if start and start >= len(data): return self.say(416, {'error': 'nothing there'})
        size = {'Content-Length': str(len(data) - start), 'Content-Type': 'application/octet-stream'}
        if start: size['Content-Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
        self.head(206 if start else 200, {**headers, 'Accept-Ranges': 'bytes', **size})
        if self.command == 'HEAD': return
        if fault and fault[0] == 'cut': return self.drop(data[start:start + fault[1]])
        if fault and fault[0] == 'slow': return self.trickle(data[start:], fault[1])
        self.wfile.write((bytes(len(data)) if fault and fault[0] == 'wrong' else data)[start:])

    def trickle(self, data, pause):
        "In pieces, with pauses of so many seconds; somebody may hang up meanwhile."
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(data), 1 << 15):
                self.wfile.write(data[at:at + (1 << 15)])
                time.sleep(pause)

    def drop(self, data):
        "The line drops in the middle."
        self.wfile.write(data)
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()


def handler_for(hub):
    class Handler(Reply):
        def do_HEAD(self): hub.answer(self)
        def do_GET(self): hub.answer(self)
    return Handler
