"README.md from nbs/index.ipynb: `python tools/make_readme.py` writes it, and a test says that the two agree."
from pathlib import Path
import re
import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
HIDDEN = re.compile(r'^#\|\s*(hide|echo:\s*false|default_exp|export)', re.M)


def progress_bar(output):
    "What a progress bar leaves in a notebook: a stream of its own, or the text of a widget."
    return output.get('name') == 'stderr' or output.output_type == 'display_data' and list(output.data) == ['text/plain']


def readme(
    root=ROOT,  # the repository
) -> str:       # the text of README.md
    "The index notebook as Markdown: cells that open with `#| hide` are left out, `#| echo: false` keeps the output alone."
    nb = nbformat.read(Path(root)/'nbs'/'index.ipynb', 4)
    nb.metadata.language_info = {'name': 'python'}
    cells = []
    for cell in nb.cells:
        directive = HIDDEN.search(cell.source) if cell.cell_type == 'code' else None
        if directive and directive[1].startswith('hide'): continue
        if directive: cell.metadata['transient'] = {'remove_source': True}
        else: cell.source = '\n'.join(l for l in cell.source.split('\n') if not l.startswith('#|')) if cell.cell_type == 'code' else cell.source
        if cell.cell_type == 'code': cell.outputs = [o for o in cell.outputs if not progress_bar(o)]
        cells.append(cell)
    nb.cells = cells
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources.get('outputs'): raise ValueError('a visible cell of index.ipynb shows a picture: save it under nbs/images and link it from a text cell')
    text = re.sub(r'\]\((images/[^)]+)\)', r'](nbs/\1)', text)             # pictures, relative to the README
    text = re.sub(r'\]\(((?:[a-z]+/)?[\w-]+\.ipynb)\)', r'](nbs/\1)', text)  # and notebooks
    text = re.sub(r'[ \t]+$', '', text, flags=re.M)
    return '<!-- made from nbs/index.ipynb by tools/make_readme.py -->\n\n' + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


if __name__ == '__main__':
    (ROOT/'README.md').write_text(readme(), encoding='utf-8')
    print(f'README.md: {len(readme().splitlines())} lines')
