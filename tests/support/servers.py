"Servers on the loopback address, with folders of their own."
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

from conftest import environment

TOKEN = 'a-token-for-the-tests'
SETTINGS = {   # a cell out of sight would otherwise leave the page
    'apputils-extension/notification': '{"fetchNews": "false", "checkForUpdates": false}',
    'notebook-extension/tracker': '{"windowingMode": "none"}',
}


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def answers(address):
    "Whether a server is up, whatever it answers."
    try: urllib.request.urlopen(f'{address}/api?token={TOKEN}', timeout=2)
    except urllib.error.HTTPError: return True
    except OSError: return False
    return True


@contextmanager
def serving(command, port, log, **dirs):
    "A server, until the block ends: its address."
    address = f'http://127.0.0.1:{port}'
    with open(log, 'w') as out:
        server = subprocess.Popen(command, env=environment(**dirs), stdout=out, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            if answers(address): break
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(.25)
        yield address
    finally:
        server.terminate()
        server.wait(20)


def jupyter_dirs(home):
    return {f'JUPYTER_{kind}_DIR': str(home/kind.lower()) for kind in ('CONFIG', 'DATA', 'RUNTIME')}


def write_settings(home):
    "JupyterLab's settings in a home of its own: the folder's name."
    for name, text in SETTINGS.items():
        file = home/'settings'/'@jupyterlab'/f'{name}.jupyterlab-settings'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return str(home/'settings')


def jupyterlab(folder, home):
    "JupyterLab that serves a folder, until the block ends: its address."
    port, settings = free_port(), write_settings(home)
    flags = ('--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1', f'--ServerApp.port={port}',
             '--ServerApp.port_retries=0', f'--IdentityProvider.token={TOKEN}',
             f'--ServerApp.root_dir={folder}')
    command = [sys.executable, '-m', 'jupyterlab', *flags]
    dirs = dict(JUPYTERLAB_SETTINGS_DIR=settings, JUPYTERLAB_WORKSPACES_DIR=str(home/'workspaces'))
    return serving(command, port, home/'log', **jupyter_dirs(home), **dirs)


def voila(notebook, home):
    "Voila that serves a notebook, until the block ends: its address."
    port = free_port()
    flags = '--no-browser', '--Voila.ip=127.0.0.1', f'--port={port}', f'--token={TOKEN}'
    command = [sys.executable, '-m', 'voila', str(notebook), *flags]
    return serving(command, port, home/'log', **jupyter_dirs(home))
