"How the house is written, counted: `python tools/style.py [FILES]` prints what breaks a rule and one row of figures."
import ast
import io
import json
import re
import statistics
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN, EXPORTED = 100, 110          # characters a line: in cells that are only read, and in exported ones
LONGEST_CELL, MOST_TOKENS = 30, 400
LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def cells(path):
    "The code cells of a notebook, or the whole of a .py file as one: (source, is it exported)."
    if path.suffix == '.py':
        yield path.read_text(encoding='utf-8'), True
        return
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] != 'code': continue
        source = ''.join(cell['source'])
        yield source, bool(re.match(r'\s*#\|\s*exporti?\b', source))


def parsed(source):
    "The syntax tree, without the lines that only IPython understands."
    plain = '\n'.join('pass' if re.match(r'\s*[%!]', line) else line for line in source.split('\n'))
    return ast.parse(plain)


def semicolons(source):
    "How many `;` stand between statements."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    try: return sum(t.type == tokenize.OP and t.string == ';' for t in tokens)
    except tokenize.TokenError: return 0


def function_tokens(source, node):
    "Tokens of a function without comments, layout and its docstring."
    lines = source.split('\n')[node.lineno - 1:node.end_lineno]
    indent = len(lines[0]) - len(lines[0].lstrip())
    text = '\n'.join(line[indent:] if not line[:indent].strip() else line for line in lines)
    try: tokens = list(tokenize.generate_tokens(io.StringIO(text + '\n').readline))
    except (tokenize.TokenError, IndentationError): return 0
    return sum(t.type not in LAYOUT for t in tokens) - bool(ast.get_docstring(node))


def functions(source, tree):
    "(name, tokens) of every function that stands in a module or a class."
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef)): continue
        for part in node.body:
            if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)): yield part.name, function_tokens(source, part)


def nested(tree):
    "Conditional expressions inside conditional expressions."
    found = [n for n in ast.walk(tree) if isinstance(n, ast.IfExp)]
    return [n for n in found if any(isinstance(m, ast.IfExp) for part in (n.body, n.test, n.orelse) for m in ast.walk(part))]


def named_lambdas(tree):
    return [n for n in ast.walk(tree) if isinstance(n, ast.Assign) and isinstance(n.value, ast.Lambda)]


def crowded(tree):
    "Comprehensions with two `for`s."
    return [n for n in ast.walk(tree) if isinstance(n, COMPREHENSIONS) and len(n.generators) > 1]


def breaches(path):
    "What breaks a rule in one file, a line each."
    for number, (source, exported) in enumerate(cells(path)):
        where = f'{path.relative_to(ROOT)}[{number}]' if path.suffix == '.ipynb' else str(path.relative_to(ROOT))
        notebook, width = path.suffix == '.ipynb', EXPORTED if exported else SHOWN
        for line in source.split('\n'):
            if len(line) > width: yield f'{where}: {len(line)} characters (at most {width}): {line.strip()[:60]}'
        if count := semicolons(source): yield f'{where}: {count} semicolons'
        if notebook and exported and (n := len(source.strip().split('\n'))) > LONGEST_CELL:
            yield f'{where}: an exported cell of {n} lines (at most {LONGEST_CELL}; 25 is the aim)'
        try: tree = parsed(source)
        except SyntaxError: continue
        for name, tokens in functions(source, tree):
            if tokens > MOST_TOKENS: yield f'{where}: {name} has {tokens} tokens (at most {MOST_TOKENS}; 160 is the aim)'
        for kind, find in dict(nested=nested, named_lambda=named_lambdas, two_for_comprehension=crowded).items():
            for node in find(tree): yield f'{where}: {kind} at line {node.lineno}'


def figures(paths):
    "One row of the table of measures, as a dictionary."
    notebooks = [list(cells(p)) for p in paths if p.suffix == '.ipynb']
    sources = [source for p in paths for source, _ in cells(p)]
    lines = [line for s in sources for line in s.split('\n') if line.strip()]
    trees = []
    for s in sources:
        try: trees.append((s, parsed(s)))
        except SyntaxError: pass
    tokens = sorted(n for s, tree in trees for _, n in functions(s, tree))
    every = [c for nb in notebooks for c in nb]
    long = [len(s.strip().split('\n')) for s, exported in every if exported]
    pairs = [(a[1], b[1]) for nb in notebooks for a, b in zip(nb, nb[1:])]
    thousand = 1000/max(len(lines), 1)
    def share(part, whole): return round(100*part/max(whole, 1), 1)
    def quantile(values, q): return sorted(values)[min(len(values) - 1, int(q*len(values)))] if values else 0
    return {
        '; per 1000 lines': round(thousand*sum(map(semicolons, sources)), 1),
        'lines over 120, %': share(sum(len(line) > 120 for line in lines), len(lines)),
        'tokens a function, median / 90% / most':
            f'{statistics.median(tokens or [0]):.0f} / {quantile(tokens, .9)} / {max(tokens or [0])}',
        'nested conditionals per 1000': round(thousand*sum(len(nested(t)) for _, t in trees), 1),
        'lambdas per 1000': round(thousand*sum(isinstance(n, ast.Lambda) for _, t in trees for n in ast.walk(t)), 1),
        'cells with a line over 100, %': share(sum(any(len(x) > 100 for x in s.split('\n')) for s, _ in every), len(every)),
        'lines an exported cell, median / 90% / most':
            f'{statistics.median(long or [0]):.0f} / {quantile(long, .9)} / {max(long or [0])}',
        'exported cell followed by one that runs, %':
            share(sum(a and not b for a, b in pairs), sum(a for a, _ in pairs)),
    }


def house(root=ROOT):
    "Every file that the rules are for."
    notebooks = [p for p in sorted((root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
    return [*notebooks, *sorted((root/'tests').rglob('*.py')), *sorted((root/'tools').rglob('*.py')), root/'setup.py']


def main():
    paths = [Path(p).resolve() for p in sys.argv[1:]] or house()
    for path in paths:
        for line in breaches(path): print(line)
    for name, value in figures(paths).items(): print(f'{name:46} {value}')


if __name__ == '__main__': main()
