"How the house is written: `python tools/style.py [FILES]` prints what breaks a rule, then the figures."
import ast
import io
import itertools
import json
import re
import statistics
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN, EXPORTED = 100, 110          # characters a line: in cells that are only read, and in exported ones
LONGEST_CELL, MOST_TOKENS = 30, 400
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT,
          tokenize.ENDMARKER}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def code_cells(path):
    "The code cells of a notebook, or the whole of a .py file as one: [(source, is it exported)]."
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.py': return [(text, True)]
    sources = [''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'code']
    return [(s, bool(re.match(r'\s*#\|\s*exporti?\b', s))) for s in sources]


def parse(source):
    "The syntax tree, or None; lines that only IPython understands are passed over."
    plain = '\n'.join('pass' if re.match(r'\s*[%!]', line) else line for line in source.split('\n'))
    try: return ast.parse(plain)
    except SyntaxError: return None


def tokens(source):
    try: return list(tokenize.generate_tokens(io.StringIO(source + '\n').readline))
    except (tokenize.TokenError, IndentationError): return []


def count_semicolons(source):
    "How many `;` stand between statements."
    return sum(t.type == tokenize.OP and t.string == ';' for t in tokens(source))


def count_tokens(source, function):
    "Tokens of a function without comments, layout and its docstring."
    lines = source.split('\n')[function.lineno - 1:function.end_lineno]
    indent = len(lines[0]) - len(lines[0].lstrip())
    text = '\n'.join(line[indent:] if not line[:indent].strip() else line for line in lines)
    return sum(t.type not in LAYOUT for t in tokens(text)) - bool(ast.get_docstring(function))


def functions(source, tree):
    "(name, tokens) of every function of a module or a class."
    for owner in ast.walk(tree):
        if not isinstance(owner, (ast.Module, ast.ClassDef)): continue
        for node in owner.body:
            if isinstance(node, FUNCTIONS): yield node.name, count_tokens(source, node)


def holds_condition(node):
    return any(isinstance(part, ast.IfExp) for part in ast.walk(node))


def nested_conditions(tree):
    "Conditional expressions inside conditional expressions."
    found = [node for node in ast.walk(tree) if isinstance(node, ast.IfExp)]
    return [node for node in found if any(map(holds_condition, (node.body, node.test, node.orelse)))]


def named_lambdas(tree):
    return [n for n in ast.walk(tree) if isinstance(n, ast.Assign) and isinstance(n.value, ast.Lambda)]


def double_comprehensions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, COMPREHENSIONS) and len(n.generators) > 1]


SHAPES = {'a conditional inside a conditional': nested_conditions, 'a lambda with a name': named_lambdas,
          'a comprehension with two fors': double_comprehensions}


def cell_breaches(source, exported, notebook):
    "What breaks a rule in one cell, a sentence each."
    width = EXPORTED if exported else SHOWN
    for line in source.split('\n'):
        if len(line) > width: yield f'{len(line)} characters (at most {width}): {line.strip()[:60]}'
    if count := count_semicolons(source): yield f'{count} semicolons'
    height = len(source.strip().split('\n'))
    if notebook and exported and height > LONGEST_CELL:
        yield f'an exported cell of {height} lines (at most {LONGEST_CELL}; 25 is the aim)'
    tree = parse(source)
    if tree is None: return
    for name, size in functions(source, tree):
        if size > MOST_TOKENS: yield f'{name} has {size} tokens (at most {MOST_TOKENS}; 160 is the aim)'
    for what, find in SHAPES.items():
        for node in find(tree): yield f'{what}, line {node.lineno}'


def breaches(path, root=ROOT):
    "What breaks a rule in one file, a line each."
    notebook, name = path.suffix == '.ipynb', path.relative_to(root)
    for number, (source, exported) in enumerate(code_cells(path)):
        where = f'{name}[{number}]' if notebook else str(name)
        for breach in cell_breaches(source, exported, notebook): yield f'{where}: {breach}'


def share(hits):
    "A list of booleans in per cent."
    return round(100*sum(hits)/max(len(hits), 1), 1)


def spread(values):
    "Median, 90th percentile and maximum, as text."
    values = sorted(values) or [0]
    ninth = values[min(len(values) - 1, int(.9*len(values)))]
    return f'{statistics.median(values):.0f} / {ninth} / {values[-1]}'


def lines_of(sources):
    "All lines that hold something."
    for source in sources: yield from filter(str.strip, source.split('\n'))


def nodes_of(trees):
    for tree in trees: yield from ast.walk(tree)


def line_figures(sources):
    "Figures of the text and its syntax."
    lines, trees = list(lines_of(sources)), list(filter(None, map(parse, sources)))
    per_thousand = 1000/max(len(lines), 1)
    lambdas = sum(isinstance(node, ast.Lambda) for node in nodes_of(trees))
    nested = sum(len(nested_conditions(tree)) for tree in trees)
    return {'; per 1000 lines': round(per_thousand*sum(map(count_semicolons, sources)), 1),
            'lines over 120, %': share([len(line) > 120 for line in lines]),
            'nested conditionals per 1000': round(per_thousand*nested, 1),
            'lambdas per 1000': round(per_thousand*lambdas, 1)}


def sizes_of(sources):
    "Tokens of every function."
    for source in sources:
        for _, size in functions(source, parse(source) or ast.Module([], [])): yield size


def cell_figures(pages):
    "Figures of notebooks; `pages` holds a list of (source, exported) each."
    cells = list(itertools.chain.from_iterable(pages))
    followed = []
    for page in pages:
        followed += [not after for (_, exported), (_, after) in zip(page, page[1:]) if exported]
    heights = [len(s.strip().split('\n')) for s, exported in cells if exported]
    return {'cells with a line over 100, %': share([max(map(len, s.split('\n'))) > SHOWN for s, _ in cells]),
            'lines an exported cell': spread(heights),
            'exported cell followed by one that runs, %': share(followed)}


def figures(paths):
    "The figures of some files: {what: value}."
    pages = {path: code_cells(path) for path in paths}
    sources = [source for source, _ in itertools.chain.from_iterable(pages.values())]
    return {**line_figures(sources), 'tokens a function': spread(sizes_of(sources)),
            **cell_figures([cells for path, cells in pages.items() if path.suffix == '.ipynb'])}


def house(root=ROOT):
    "Every file that the rules are for."
    notebooks = [p for p in sorted((root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
    scripts = sorted([*(root/'tests').rglob('*.py'), *(root/'tools').rglob('*.py')])
    return [*notebooks, *scripts, root/'setup.py']


def main():
    paths = [Path(p).resolve() for p in sys.argv[1:]] or house()
    for path in paths:
        for line in breaches(path): print(line)
    for name, value in figures(paths).items(): print(f'{name:46} {value}')


if __name__ == '__main__': main()
