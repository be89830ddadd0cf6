"README.md from nbs/index.ipynb: `python tools/make_readme.py` writes it, and a test says that the two agree."
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
HIDDEN = re.compile(r'^#\|\s*(hide|echo:\s*false|default_exp|export)', re.M)
HEAD = '<!-- made from nbs/index.ipynb by tools/make_readme.py -->'


def is_progress_bar(output):
    "What a progress bar leaves in a notebook: a stream of its own, or the text of a widget."
    if output.get('name') == 'stderr': return True
    return output.output_type == 'display_data' and list(output.data) == ['text/plain']


def shown_cells(cells):
    "The cells that the README shows: `#| hide` leaves a cell out, `#| echo: false` keeps its output alone."
    for cell in cells:
        if cell.cell_type == 'code':
            directive = HIDDEN.search(cell.source)
            if directive and directive[1].startswith('hide'): continue
            if directive: cell.metadata['transient'] = {'remove_source': True}
            cell.source = '\n'.join(line for line in cell.source.split('\n') if not line.startswith('#|'))
            cell.outputs = [output for output in cell.outputs if not is_progress_bar(output)]
        yield cell


def relative_to_readme(text):
    "Links to pictures and notebooks, as they are from the repository's root."
    text = re.sub(r'\]\((images/[^)]+)\)', r'](nbs/\1)', text)
    return re.sub(r'\]\(((?:[a-z]+/)?[\w-]+\.ipynb)\)', r'](nbs/\1)', text)


def readme(
    root=ROOT,  # the repository
) -> str:       # the text of README.md
    "The index notebook as Markdown. Raises ValueError for a picture that stands in an output."
    nb = nbformat.read(Path(root)/'nbs'/'index.ipynb', 4)
    nb.metadata.language_info = {'name': 'python'}
    nb.cells = list(shown_cells(nb.cells))
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources.get('outputs'):
        raise ValueError('a visible cell of the index shows a picture: save it under nbs/images and link it')
    text = re.sub(r'[ \t]+$', '', relative_to_readme(text), flags=re.M)
    return f'{HEAD}\n\n' + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


if __name__ == '__main__':
    (ROOT/'README.md').write_text(readme(), encoding='utf-8')
    print(f'README.md: {len(readme().splitlines())} lines')
