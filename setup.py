"Everything that setuptools wants to know stands in settings.ini; this file only hands it over."
import shutil
from configparser import ConfigParser
from pathlib import Path

from packaging.version import parse
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

NEEDED = '''lib_name user branch license status min_python audience language description keywords
            author author_email'''.split()
LICENSES = {'apache2': ('Apache-2.0', 'License :: OSI Approved :: Apache Software License')}
STATUSES = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature',
            '7 - Inactive']
PYTHONS = '3.10 3.11 3.12 3.13 3.14'.split()

parser = ConfigParser(delimiters=['='])
parser.read('settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
for key in NEEDED: assert key in cfg, f'settings.ini lacks {key}'

name = cfg['lib_name']
licence, licence_classifier = LICENSES[cfg['license'].lower()]
readme = Path('README.md')
classifiers = [
    'Development Status :: ' + STATUSES[int(cfg['status']) - 1], f"Intended Audience :: {cfg['audience']}",
    licence_classifier, f"Natural Language :: {cfg['language']}",
    *(f'Programming Language :: Python :: {v}' for v in PYTHONS if parse(v) >= parse(cfg['min_python'])),
]
WEIGHTS = [f'weights/**/*.{suffix}' for suffix in 'onnx safetensors json jsonl txt md png'.split()]


class WithNotebooks(build_py):
    "The wheel carries a copy of the notebooks, which `faceid-nb lab` opens wherever it is installed."
    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False): return  # an editable install reads nbs/ itself
        to = Path(self.build_lib)/name/'notebooks'
        shutil.rmtree(to, ignore_errors=True)
        skip = shutil.ignore_patterns('.*', '_*', 'faceid-demo', 'out')
        shutil.copytree(cfg['nbs_path'], to, ignore=skip)


setup(
    name=name,
    version=cfg['version'],
    license=licence,
    description=cfg['description'],
    keywords=cfg['keywords'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    url=cfg.get('git_url') or None,
    classifiers=classifiers,
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg.get('requirements', '').split(),
    extras_require={extra: cfg.get(f'{extra}_requirements', '').split() for extra in ('dev', 'lab', 'gpu')},
    packages=find_packages(include=[name, f'{name}.*']),
    zip_safe=False,
    package_data={name: [*WEIGHTS, 'static/*.js', 'static/*.css']},
    entry_points={'console_scripts': cfg.get('console_scripts', '').split(),
                  'nbdev': [f'{name}={name}._modidx:d']},
    cmdclass={'build_py': WithNotebooks},
)
