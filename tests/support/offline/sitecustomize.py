"First on the path of every process that the tests start: a connection to anything but this machine fails at once."
import socket

_connect = socket.socket.connect


def connect(self, address):
    local = self.family not in (socket.AF_INET, socket.AF_INET6) or address[0] in ('localhost', '::1') or address[0].startswith('127.')
    if not local: raise OSError(f'the tests run offline: no connection to {address}')
    return _connect(self, address)


socket.socket.connect = connect
