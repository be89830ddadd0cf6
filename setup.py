"Everything that setuptools wants to know stands in settings.ini; this file only hands it over."
from configparser import ConfigParser
from pathlib import Path
import shutil
from packaging.version import parse
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

parser = ConfigParser(delimiters=['='])
parser.read('settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
needed = 'lib_name user branch license status min_python audience language description keywords author author_email'.split()
for name in needed: assert name in cfg, f'settings.ini lacks {name}'

LICENSES = {'apache2': ('Apache-2.0', 'License :: OSI Approved :: Apache Software License')}
STATUSES = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature', '7 - Inactive']
PYTHONS = '3.10 3.11 3.12 3.13 3.14'.split()
licence, classifier = LICENSES[cfg['license'].lower()]
requirements = cfg.get('requirements', '').split()
extras = {name: cfg.get(f'{name}_requirements', '').split() for name in ('dev', 'lab', 'gpu')}


class WithNotebooks(build_py):
    "The wheel carries a copy of the notebooks, so that `faceid-nb lab` has something to open wherever it is installed."
    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False): return  # an editable install reads nbs/ itself
        to = Path(self.build_lib)/cfg['lib_path']/'notebooks'
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(cfg['nbs_path'], to, ignore=shutil.ignore_patterns('.*', '_*', 'faceid-demo', 'out'))


setup(
    name=cfg['lib_name'], version=cfg['version'], license=licence,
    description=cfg['description'], keywords=cfg['keywords'], author=cfg['author'], author_email=cfg['author_email'],
    long_description=Path('README.md').read_text(encoding='utf-8') if Path('README.md').exists() else cfg['description'],
    long_description_content_type='text/markdown', url=cfg.get('git_url') or None,
    classifiers=['Development Status :: ' + STATUSES[int(cfg['status'])-1], f"Intended Audience :: {cfg['audience']}", classifier,
                 f"Natural Language :: {cfg['language']}"]
        + [f'Programming Language :: Python :: {v}' for v in PYTHONS if parse(v) >= parse(cfg['min_python'])],
    python_requires=f">={cfg['min_python']}", install_requires=requirements, extras_require=extras,
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']), zip_safe=False,
    package_data={cfg['lib_path']: [f'weights/**/*.{ext}' for ext in 'onnx safetensors json jsonl txt md png'.split()]},
    entry_points={'console_scripts': cfg.get('console_scripts', '').split(), 'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    cmdclass={'build_py': WithNotebooks},
)
