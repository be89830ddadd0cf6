"Face packs as archives: the tiny networks under the name of another pack."
import io
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = {p.name: p.read_bytes()
            for p in (ROOT/'faceid_nb'/'weights'/'tiny'/'models'/'tiny').glob('*.onnx')}


def archive(files=NETWORKS):
    "A zip of {name: bytes}."
    b = io.BytesIO()
    with zipfile.ZipFile(b, 'w') as z:
        for name, data in files.items(): z.writestr(name, data)
    return b.getvalue()
