"First on the path of every process that the tests start: a connection to another machine fails at once."
import socket

_connect = socket.socket.connect


def is_local(family, address):
    if family not in (socket.AF_INET, socket.AF_INET6): return True
    return address[0] in ('localhost', '::1') or address[0].startswith('127.')


def connect(self, address):
    if not is_local(self.family, address): raise OSError(f'the tests run offline: no connection to {address}')
    return _connect(self, address)


socket.socket.connect = connect
