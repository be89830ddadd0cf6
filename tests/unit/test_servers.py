"The one server that this package starts, JupyterLab by `faceid-nb lab`: loopback address and token."
import ast
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, environment
from helpers_cli import CLI

LISTENERS = {'socket', 'socketserver', 'http.server', 'wsgiref', 'aiohttp', 'tornado', 'flask', 'uvicorn'}
MODULES = sorted(p for p in (ROOT/'faceid_nb').rglob('*.py') if '__pycache__' not in p.parts)


def imported(path):
    "Names of modules that a module imports, anywhere in it."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom): yield node.module or ''


@pytest.mark.parametrize('path', MODULES, ids=[str(p.relative_to(ROOT)) for p in MODULES])
def test_no_module_listens_itself(path):
    names = {*imported(path)}
    assert not {n for n in names if n in LISTENERS or n.split('.')[0] in LISTENERS}


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab as `faceid-nb lab` starts it: (its process, its address, its token)."
    home = tmp_path_factory.mktemp('lab')
    folders = {f'JUPYTER_{kind}_DIR': str(home/kind.lower()) for kind in ('CONFIG', 'DATA', 'RUNTIME')}
    process = subprocess.Popen(
        [*CLI, 'lab', str(home/'lab'), '--no-browser'], cwd=home,
        stderr=subprocess.PIPE, text=True, env=environment(IPYTHONDIR=str(home/'ipython'), **folders))
    try:
        lines = iter(process.stderr.readline, '')
        url = next(filter(None, (re.search(r'(http://[^/]+)/lab\?token=(\w+)', line) for line in lines)))
        wait_for(url[1])
        yield process, *url.groups()
    finally:
        process.terminate()
        process.wait(30)


def wait_for(address):
    for _ in range(240):
        if ask(address, 'api') is not None: return
        time.sleep(.25)


class Here(urllib.request.HTTPRedirectHandler):
    "Goes nowhere else: who has no token is sent to the page that asks for one."
    def redirect_request(self, *_): return None


OPENER = urllib.request.build_opener(Here)


def answer(address, path, method='GET', data=None, **headers):
    "(status, body, where it sends to) of an answer. Raises OSError where nobody listens."
    request = urllib.request.Request(f'{address}/{path}', data, headers, method=method)
    try:
        with OPENER.open(request, timeout=20) as a: return a.status, a.read(), None
    except urllib.error.HTTPError as e:
        with e: return e.code, e.read(), e.headers.get('Location')


def ask(*how, **headers):
    "The status of an answer; None where nobody listens."
    try: return answer(*how, **headers)[0]
    except OSError: return None


def listening(pid):
    "The addresses that a process listens on."
    files = (os.readlink(f) for f in Path(f'/proc/{pid}/fd').iterdir() if f.is_symlink())
    own = {name[8:-1] for name in files if name.startswith('socket:[')}
    found = set()
    for table in ('tcp', 'tcp6'):
        for line in Path(f'/proc/{pid}/net/{table}').read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == '0A' and fields[9] in own: found.add(address_of(fields[1].split(':')[0]))
    return found


def address_of(text):
    "An address as /proc writes it, in the usual form."
    words = [struct.pack('=I', int(text[k:k + 8], 16)) for k in range(0, len(text), 8)]
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, b''.join(words))


@pytest.mark.skipif(sys.platform != 'linux', reason='sockets are read from /proc')
def test_it_listens_on_the_loopback_address_only(lab):
    assert listening(lab[0].pid) == {'127.0.0.1'}


CALLS = [('GET', 'api/contents'), ('GET', 'api/sessions'), ('POST', 'api/kernels'), ('POST', 'api/terminals'),
         ('GET', 'files/index.ipynb'), ('PUT', 'api/contents/x.ipynb'),
         ('DELETE', 'api/contents/index.ipynb')]


@pytest.mark.parametrize('method, path', CALLS)
def test_nothing_is_done_without_the_token(lab, method, path):
    data = json.dumps({}).encode() if method != 'GET' else None
    status, body, elsewhere = answer(lab[1], path, method, data)
    if status == 302: assert elsewhere.startswith('/login?') and body == b''
    else: assert status in (403, 404, 405)


@pytest.mark.parametrize('token', ['', 'wrong', '0'*48])
def test_a_wrong_token_is_none(lab, token):
    assert ask(lab[1], 'api/contents', Authorization=f'token {token}') == 403


def test_the_token_opens(lab):
    assert ask(lab[1], 'api/contents', Authorization=f'token {lab[2]}') == 200


def test_a_page_from_elsewhere_starts_nothing(lab):
    "A web site that the browser shows may ask this machine; it does not know the token."
    headers = {'Origin': 'http://example.com', 'Content-Type': 'text/plain'}
    assert ask(lab[1], 'api/kernels', 'POST', b'{}', **headers) in (403, 404)
    own = dict(Authorization=f'token {lab[2]}')
    assert answer(lab[1], 'api/kernels', **own)[1] == b'[]'
