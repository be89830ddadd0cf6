"""A loopback server that speaks as much of the model hub's protocol as its clients use: repository listings, HEAD and GET of files with entity tags, ranges.

`Hub(repos)` serves {'owner/name': folder}; `.packs` holds archives by name, below the address `.pack_url`. `.faults` is a list of functions (path, method) -> None,
an HTTP status, ('cut', bytes), ('wrong',) for zeros or ('whole',) for a server that knows no ranges, asked in turn for every file.
"""
import hashlib, json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    def __init__(self, repos, token=None):
        self.repos, self.token, self.faults, self.asked = {k: Path(v) for k, v in repos.items()}, token, [], []
        self.packs = {}
        hub = self
        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'
            def log_message(self, *a): pass
            def do_HEAD(self): hub.answer(self, 'HEAD')
            def do_GET(self): hub.answer(self, 'GET')
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        self.pack_url = f'{self.url}/packs'
        threading.Thread(target=self.server.serve_forever, args=(.02,), daemon=True).start()
    def close(self):
        self.server.shutdown()
        self.server.server_close()
    def __enter__(self): return self
    def __exit__(self, *exc): self.close()

    def files(self, repo): return sorted(str(p.relative_to(self.repos[repo])) for p in self.repos[repo].rglob('*') if p.is_file())
    def sha(self, repo): return hashlib.sha1(repo.encode()).hexdigest()

    def answer(self, h, method):
        path = unquote(urlsplit(h.path).path).strip('/')
        self.asked.append((method, path, h.headers.get('Range')))
        if self.token and h.headers.get('Authorization') != f'Bearer {self.token}': return self.say(h, method, 401, {'error': 'Invalid username or password.'}, {'X-Error-Code': 'GatedRepo', 'X-Error-Message': 'Access to this model is restricted.'})
        parts = path.split('/')
        if parts[:2] == ['api', 'models']:
            repo = '/'.join(parts[2:4])
            if repo not in self.repos: return self.say(h, method, 404, {'error': 'Repository not found'}, {'X-Error-Code': 'RepoNotFound'})
            if len(parts) > 4 and parts[4] == 'tree': return self.say(h, method, 200, [dict(type='file', path=f, size=(self.repos[repo]/f).stat().st_size, oid=self.etag(self.repos[repo]/f)) for f in self.files(repo)])
            return self.say(h, method, 200, dict(_id='0', id=repo, modelId=repo, sha=self.sha(repo), private=False, tags=[], downloads=0, siblings=[dict(rfilename=f) for f in self.files(repo)]))
        if len(parts) > 4 and parts[2] == 'resolve': return self.file(h, method, '/'.join(parts[:2]), '/'.join(parts[4:]))
        if parts[0] == 'packs': return self.pack(h, method, '/'.join(parts[1:]))
        self.say(h, method, 404, {'error': f'no such page: {path}'})

    def etag(self, file): return hashlib.sha256(file.read_bytes()).hexdigest()
    def fault(self, path, method): return next((f for f in (fault(path, method) for fault in self.faults) if f), None)

    def file(self, h, method, repo, name):
        fault = self.fault(f'{repo}/{name}', method)
        if isinstance(fault, int): return self.say(h, method, fault, {'error': 'fault'})
        if repo not in self.repos: return self.say(h, method, 404, {'error': 'Repository not found'}, {'X-Error-Code': 'RepoNotFound'})
        if name not in self.files(repo): return self.say(h, method, 404, {'error': 'Entry not found'}, {'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': self.sha(repo)})
        self.send(h, method, (self.repos[repo]/name).read_bytes(), fault, {'ETag': f'"{self.etag(self.repos[repo]/name)}"', 'X-Repo-Commit': self.sha(repo)})

    def pack(self, h, method, name):
        fault = self.fault(f'packs/{name}', method)
        if isinstance(fault, int) or name not in self.packs: return self.say(h, method, fault if isinstance(fault, int) else 404, {'error': 'fault'})
        self.send(h, method, self.packs[name], fault, {})

    def send(self, h, method, data, fault, headers):
        r = h.headers.get('Range', '')
        start = int(r[6:].split('-')[0] or 0) if r.startswith('bytes=') and (fault or [''])[0] != 'whole' else 0
        if start and start >= len(data): return self.say(h, method, 416, {'error': 'nothing there'})
        h.send_response(206 if start else 200)
        for k, v in {**headers, 'Accept-Ranges': 'bytes', 'Content-Length': str(len(data) - start), 'Content-Type': 'application/octet-stream',
                     **({'Content-Range': f'bytes {start}-{len(data) - 1}/{len(data)}'} if start else {})}.items(): h.send_header(k, v)
        h.end_headers()
        if method == 'HEAD': return
        if fault and fault[0] == 'cut':   # the line drops in the middle
            h.wfile.write(data[start:start + fault[1]])
            h.wfile.flush()
            h.close_connection = True
            h.connection.close()
            return
        if fault and fault[0] == 'wrong': data = bytes(len(data))
        h.wfile.write(data[start:])

    def say(self, h, method, status, what, headers={}):
        body = json.dumps(what).encode()
        h.send_response(status)
        for k, v in {'Content-Type': 'application/json', 'Content-Length': str(len(body)), **headers}.items(): h.send_header(k, v)
        h.end_headers()
        if method != 'HEAD': h.wfile.write(body)
