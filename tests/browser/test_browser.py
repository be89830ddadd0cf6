"The dashboards in a real browser: JupyterLab and Voila on the loopback address with a token, Chromium driven by Playwright."
import os, re, shutil, socket, statistics, subprocess, sys, time, urllib.error, urllib.request
from base64 import b64encode
from contextlib import contextmanager
from pathlib import Path
import pytest
from conftest import ROOT, environment

sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed: pip install playwright')
CHROMIUM = next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='no Chromium here: apt-get install chromium')
FLAGS = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()
TOKEN = 'a-token-for-the-tests'
SHOTS = Path(os.environ.get('FACEID_SCREENSHOTS', ROOT/'out'/'screenshots'))   # looked at, and kept by CI


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@contextmanager
def serving(command, port, log, **dirs):
    "A server on the loopback address, until the block ends: its address."
    address = f'http://127.0.0.1:{port}'
    with open(log, 'w') as out: server = subprocess.Popen(command, env=environment(**dirs), stdout=out, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f'{address}/api?token={TOKEN}', timeout=2)
                break
            except urllib.error.HTTPError: break   # it answers
            except OSError:
                assert server.poll() is None, log.read_text()[-2000:]
                time.sleep(.25)
        yield address
    finally:
        server.terminate()
        server.wait(20)


def jupyter_dirs(home): return {f'JUPYTER_{k}_DIR': str(home/k.lower()) for k in ('CONFIG', 'DATA', 'RUNTIME')}


@pytest.fixture(scope='module')
def home(tmp_path_factory): return tmp_path_factory.mktemp('jupyter')


@pytest.fixture(scope='module')
def lab(project, home):
    "JupyterLab with folders of its own, serving a copy of the notebooks: its address."
    port, settings = free_port(), home/'settings'/'@jupyterlab'
    for name, text in {'apputils-extension/notification': '{"fetchNews": "false", "checkForUpdates": false}', 'notebook-extension/tracker': '{"windowingMode": "none"}'}.items():   # otherwise a cell out of sight leaves the page
        (settings/name).parent.mkdir(parents=True, exist_ok=True)
        (settings/f'{name}.jupyterlab-settings').write_text(text)
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1', f'--ServerApp.port={port}', '--ServerApp.port_retries=0', f'--IdentityProvider.token={TOKEN}', f'--ServerApp.root_dir={project/"nbs"}']
    with serving(command, port, home/'log', **jupyter_dirs(home), JUPYTERLAB_SETTINGS_DIR=str(home/'settings'), JUPYTERLAB_WORKSPACES_DIR=str(home/'workspaces')) as address: yield address


@pytest.fixture(scope='module')
def browser():
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope='module')
def page(lab, browser):
    "The dashboards' page, run to its end."
    page = browser.new_page(viewport=dict(width=1280, height=1000))
    page.set_default_timeout(30_000)
    page.wrong, page.asked = [], set()
    page.on('pageerror', lambda e: page.wrong.append(str(e)))
    page.on('request', lambda r: page.asked.add(r.url))
    page.goto(f'{lab}/lab/tree/studio/44_dashboard.ipynb?token={TOKEN}')
    page.locator('.jp-Notebook').wait_for()
    page.get_by_text('Python 3 (ipykernel) | Idle').wait_for()
    page.wait_for_timeout(1000)
    for _ in range(3):   # a menu that is opened while the page settles may close again
        try:
            page.get_by_role('menuitem', name='Run', exact=True).click(timeout=10_000)
            page.get_by_text('Run All Cells', exact=True).click(timeout=10_000)
            page.locator('button:has-text("Generate")').first.wait_for(timeout=90_000)
            break
        except sync_api.TimeoutError:
            shot(page, 'not-started')
            page.keyboard.press('Escape')
    else: raise AssertionError('the page did not run: see not-started.png')
    page.get_by_text('Python 3 (ipykernel) | Idle').wait_for()
    yield page
    page.close()


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    from PIL import Image
    from faceid_nb.tiny.people import render, sample_people
    folder = tmp_path_factory.mktemp('photographs')
    a, b = (p.image for p in render(sample_people(2, 7), seed=1, size=160, hat=None, glasses=0))
    both = Image.new('RGB', (320, 160))
    both.paste(a, (0, 0))
    both.paste(b.resize((120, 120)), (180, 20))
    both.save(folder/'two.png')
    Image.new('RGB', (96, 96), 'blue').save(folder/'wall.png')
    import numpy as np
    noise = np.random.default_rng(0).integers(0, 40, (1500, 1500, 3))
    large = np.asarray(a.resize((1500, 1500)), int)//2 + noise
    Image.fromarray(large.astype(np.uint8)).save(folder/'large.png')
    return folder


def shot(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS/f'{name}.png')
def wait(page, what, seconds=60):
    "Until `what` holds."
    end = time.time() + seconds
    while not what():
        if time.time() > end:
            shot(page, 'waited-in-vain')
            raise AssertionError(board(page).inner_text()[-800:])
        page.wait_for_timeout(50)
def board(page): return page.locator('.faceid-board').last
def button(page, text): return board(page).locator(f'button:has-text("{text}"):visible')
def tab(page, name):
    page.get_by_role('tab', name=name).click()
    page.wait_for_timeout(200)
def labelled(page, text): return board(page).get_by_label(text, exact=True).locator('visible=true')
def slider(page, label): return board(page).locator(f'.widget-hslider:has-text("{label}"):visible')
def set_slider(page, label, value):
    box = slider(page, label).locator('.widget-readout')
    box.fill(str(value))
    box.press('Enter')
def upload(page, path):
    with page.expect_file_chooser() as chooser: button(page, 'Drop photographs').click()
    chooser.value.set_files(path)
def drop(page, path):
    "As from a file manager."
    files = page.evaluate_handle("""([name, data]) => { const t = new DataTransfer(); t.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name, {type: "image/png"})); return t; }""", [path.name, b64encode(path.read_bytes()).decode()])
    for kind in ('dragenter', 'dragover', 'drop'): button(page, 'Drop photographs').dispatch_event(kind, dict(dataTransfer=files))
def likenesses(page): return re.findall(r'likeness (-?\d\.\d\d)\nseed', board(page).inner_text())
def finished(page, text, seconds=90):
    page.wait_for_timeout(100)
    wait(page, lambda: button(page, text).first.is_enabled(), seconds)
def alert(page): return board(page).get_by_role('alert')


# what is visited, in this order

def a_photograph_without_a_face_is_answered_and_the_controls_live(page, photographs):
    upload(page, photographs/'wall.png')
    alert(page).wait_for()
    assert "No face was found in 'wall.png'" in alert(page).inner_text()
    shot(page, 'no-face')
    button(page, 'Generate').click()
    wait(page, lambda: 'Add a photograph' in alert(page).inner_text())


def a_large_photograph_is_made_smaller_by_the_browser(page, photographs):
    assert (photographs/'large.png').stat().st_size > 4e6
    upload(page, photographs/'large.png')
    wait(page, lambda: 'large.png' in board(page).inner_text())
    assert not alert(page).count()
    button(page, 'remove').click()
    wait(page, lambda: 'large.png' not in board(page).inner_text())


def drop_choose_generate_and_likeness(page, photographs):
    drop(page, photographs/'two.png')
    wait(page, lambda: 'two.png' in board(page).inner_text())
    assert not alert(page).count()
    second, picture = (board(page).locator(l) for l in ('.widget-toggle-buttons button >> nth=1', 'button.faceid-tile:has(img[alt^="two.png"])'))
    chosen = lambda: 'mod-active' in (second.get_attribute('class') or '')
    box = picture.locator('img').bounding_box()
    picture.click(position=dict(x=.8*box['width'], y=.5*box['height']))
    wait(page, chosen)
    board(page).locator('.widget-toggle-buttons button').first.click()
    wait(page, lambda: not chosen())
    second.click()
    wait(page, chosen)
    set_slider(page, 'steps', 12)
    set_slider(page, 'pictures', 2)
    go, stop = (button(page, n) for n in ('Generate', 'Stop'))
    assert stop.is_disabled()
    go.click()
    wait(page, lambda: re.search(r'step \d+ of 12', board(page).inner_text()) or len(likenesses(page)) == 2)
    wait(page, lambda: len(likenesses(page)) == 2)
    wait(page, lambda: go.is_enabled() and stop.is_disabled())
    text = board(page).inner_text()
    assert '2 made in' in text and re.search(r'(cpu|cuda\S*), float\d+ \| memory \d+\.\d of \d+ GB \| faces: \w+ExecutionProvider \| files go into portraits/', text)


def stop_in_the_middle_with_a_preview_and_again(page):
    set_slider(page, 'steps', 200)
    go, stop = (button(page, n) for n in ('Generate', 'Stop'))
    go.click()
    wait(page, lambda: board(page).locator('.faceid-preview img:visible').count() == 2)
    shot(page, 'preview')
    seed, took = labelled(page, 'seed'), []
    for _ in range(5):   # a control that the kernel answers, while it generates
        took.append(page.evaluate('async ([button, e]) => { const began = performance.now(), v = e.value; button.click(); while (e.value === v) await new Promise(r => setTimeout(r, 1)); return performance.now() - began; }', [board(page).locator('button[title="another seed"]').element_handle(), seed.element_handle()]))
    assert stop.is_enabled(), 'it ended before the controls were tried'
    print(f'a click is answered in {statistics.median(took):.0f} ms while it generates (median of 5, from the click to the changed page)')
    assert statistics.median(took) < 500
    began = time.time()
    stop.click()
    wait(page, lambda: go.is_enabled(), 20)
    assert time.time() - began < 15 and 'stopped' in board(page).inner_text() and len(likenesses(page)) == 2
    seed.fill('0')
    seed.press('Enter')
    set_slider(page, 'steps', 4)
    go.click()
    wait(page, lambda: len(likenesses(page)) == 4)
    finished(page, 'Generate')


def controls_fit_the_variant(page):
    model = labelled(page, 'model')
    assert slider(page, 'structure').count() == 1
    model.select_option('tiny-faceid')
    wait(page, lambda: slider(page, 'structure').count() == 0)
    model.select_option('sd15-plusv2 (download)')
    wait(page, lambda: 'download of 4.7 GB or more' in board(page).inner_text() and 'non-commercial research only' in board(page).inner_text())
    button(page, 'Generate').click()
    wait(page, lambda: 'is not on this machine' in alert(page).inner_text())
    model.select_option('tiny-plusv2')
    wait(page, lambda: slider(page, 'structure').count() == 1)


def the_code_is_executed_and_a_saved_picture_restores_its_settings(page, project, photographs, monkeypatch):
    import numpy as np
    from PIL import Image
    from faceid_nb.faceid import read_record
    button(page, 'save').last.click()
    wait(page, lambda: 'saved as portraits' in board(page).inner_text())
    file, = (project/'nbs'/'portraits').glob('*.png')
    assert read_record(file)['settings']['model'] == 'tiny-plusv2'
    button(page, 'code').last.click()
    code = board(page).locator('.faceid-code pre:visible')
    wait(page, lambda: 'model.generate(' in code.inner_text())
    assert "read('two.png')[1]" in code.inner_text()
    with monkeypatch.context() as m:
        m.chdir(photographs)
        exec(code.inner_text(), names := {})
    with Image.open(file) as saved: assert np.abs(np.asarray(saved, int) - np.asarray(names['picture'], int)).max() <= 2
    prompt = labelled(page, 'prompt')
    prompt.fill('something else')
    prompt.press('Tab')
    set_slider(page, 'identity', .3)
    drop(page, file)
    wait(page, lambda: prompt.input_value() == 'photo of a person, smiling')
    assert 'settings restored' in board(page).inner_text() and slider(page, 'identity').locator('.widget-readout').inner_text() == '1.00'


def portraits_are_compared_and_kept(page):
    tiles = board(page).locator('.faceid-gallery button.faceid-tile')
    n = tiles.count()
    tiles.nth(0).click()
    tiles.nth(1).focus()
    page.keyboard.press('Enter')
    beside = board(page).locator('.faceid-beside')
    wait(page, lambda: beside.locator('img:visible').count() == 3)
    assert 'likeness' in beside.inner_text() and 'seed' in beside.inner_text()
    board(page).scroll_into_view_if_needed()
    shot(page, 'portraits')
    button(page, 'keep').first.click()
    button(page, 'clear').click()
    wait(page, lambda: tiles.count() == 1 < n)


def a_grid_is_filled_stopped_resumed_and_a_cell_enlarged(page, project):
    tab(page, 'Structure')
    set_slider(page, 'steps', 40)
    values = labelled(page, 's_scales')
    values.fill('0, x')
    values.press('Enter')
    wait(page, lambda: 'takes numbers' in alert(page).inner_text())
    values.fill('0, 1, 2')
    values.press('Enter')
    wait(page, lambda: not alert(page).count())
    seeds = labelled(page, 'seeds')
    seeds.fill('0, 1, 2, 3')
    seeds.press('Enter')
    go = button(page, 'Fill the grid')
    go.click()
    cells = board(page).locator('.faceid-grid button.faceid-tile')
    done = lambda: len(re.findall(r'-?\d\.\d\d / \d\.\d\d', board(page).locator('.faceid-grid').inner_text()))
    wait(page, lambda: cells.count() == 12)
    wait(page, lambda: board(page).locator('.faceid-grid .dim img:visible').count())
    wait(page, lambda: done() >= 3)
    button(page, 'Stop').click()
    wait(page, lambda: button(page, 'Resume').count() and button(page, 'Resume').is_enabled())
    assert 3 <= done() < 12 and 'cells to go' in board(page).inner_text()
    shot(page, 'grid-stopped')
    button(page, 'Resume').click()
    wait(page, lambda: done() == 12, 120)
    finished(page, 'Fill the grid')
    assert '12 cells' in board(page).inner_text() and len(list((project/'nbs'/'portraits'/'sweeps'/'pictures').glob('*.png'))) == 12
    scroll = board(page).locator('.faceid-scroll:visible')
    board(page).evaluate('e => e.scrollIntoView()')
    scroll.evaluate('e => { e.scrollTop = 1e6; }')
    assert scroll.evaluate('e => e.scrollTop > 0 && e.getBoundingClientRect().bottom <= innerHeight'), 'a long grid scrolls by itself'
    sync_api.expect(board(page).get_by_text('files go into portraits/')).to_be_in_viewport()
    cells.nth(4).click()
    large = board(page).locator('.faceid-large')
    wait(page, lambda: large.locator('img:visible').count() == 2 and 'structure distance' in large.inner_text())
    assert cells.nth(4).get_attribute('aria-pressed') == 'true'
    button(page, 'Export').click()
    wait(page, lambda: 'written: portraits' in board(page).inner_text())
    assert {f.name for f in (project/'nbs'/'portraits').glob('grid*')} == {'grid_0001.png', 'grid_0001.csv', 'grid_0001_curves.png'}
    board(page).scroll_into_view_if_needed()
    shot(page, 'structure')
    picture(page, 'structure')


def likeness_is_compared_surveyed_and_searched(page):
    tab(page, 'Similarity')
    set_slider(page, 'steps', 8)
    button(page, 'a drawn person').click()
    wait(page, lambda: 'person 24' in board(page).inner_text())
    figures = lambda: board(page).locator('.jupyter-widgets .faceid-tile img[alt*="heat map"]:visible, .faceid-tile img[alt*="mean likeness"]:visible, .faceid-tile img[alt*="against"]:visible').count()
    button(page, 'Compare people').click()
    finished(page, 'Compare people')
    wait(page, lambda: figures() == 1)
    scales = labelled(page, 'scales')
    scales.fill('0.5, 1')
    scales.press('Enter')
    button(page, 'Survey').click()
    finished(page, 'Survey')
    wait(page, lambda: figures() == 3)
    set_slider(page, 'target', .2)
    button(page, 'Find').click()
    finished(page, 'Find')
    wait(page, lambda: 'a likeness of 0.20 is' in board(page).inner_text())
    button(page, 'use them').click()
    scale = float(re.search(r'at scale (\d\.?\d*)', board(page).inner_text())[1])
    wait(page, lambda: float(slider(page, 'identity').locator('.widget-readout').inner_text()) == scale)
    assert f'scale {scale:g},' in labelled(page, 'weights').evaluate('e => e.selectedOptions[0].text').replace('\xa0', ' ')
    shot(page, 'similarity')
    picture(page, 'similarity')


def attention_is_walked_through_by_keyboard(page):
    tab(page, 'Attention')
    button(page, 'Make and look').click()
    finished(page, 'Make and look')
    maps = board(page).locator('.faceid-maps img:visible')
    wait(page, lambda: maps.count() == 5)
    first = maps.nth(1).get_attribute('src')
    handle = slider(page, 'layer').locator('[role=slider]')
    handle.focus()
    page.keyboard.press('ArrowRight')
    wait(page, lambda: 'layer down' in board(page).inner_text() and maps.nth(1).get_attribute('src') != first)
    slider(page, 'step').locator('[role=slider]').last.focus()
    page.keyboard.press('ArrowRight')
    wait(page, lambda: ', step 1' in board(page).inner_text())
    shot(page, 'attention')
    picture(page, 'attention')


def picture(page, name):
    "The board alone, for README and notebook."
    view = page.viewport_size
    page.set_viewport_size(dict(width=1280, height=1900))
    board(page).scroll_into_view_if_needed()
    page.wait_for_timeout(200)
    board(page).screenshot(path=SHOTS/f'dashboard_{name}.png')
    page.set_viewport_size(view)


NAMELESS = """board => [...board.querySelectorAll('button, input, select, textarea, [role=slider]')].filter(e => e.offsetParent && e.type !== 'file').map(e => {
  const by = (e.getAttribute('aria-labelledby') || '').split(' ').map(i => document.getElementById(i)).filter(Boolean).map(l => l.textContent).join(' '), box = e.closest('.jupyter-widgets.widget-inline-hbox, .widget-hslider');
  return {what: e.tagName + ' ' + e.className, name: (e.getAttribute('aria-label') || by || (e.labels && [...e.labels].map(l => l.textContent).join(' ')) || e.title || e.textContent || (e.querySelector && e.querySelector('img') || {}).alt || (box && (box.querySelector('label') || {}).textContent) || '').trim(), tab: e.tabIndex, disabled: !!e.disabled };
}).filter(c => !c.name || (c.tab < 0 && !c.disabled))"""
PALE = """board => { const rgb = s => (s.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number), lum = c => { const f = c.slice(0, 3).map(v => (v /= 255) <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4); return .2126*f[0] + .7152*f[1] + .0722*f[2]; };
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > .5) return c; } return [255, 255, 255]; };
  return [...board.querySelectorAll('*')].filter(e => e.offsetParent && !e.closest('[disabled], option') && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).map(e => { const a = lum(rgb(getComputedStyle(e).color)), b = lum(behind(e)); return [e.textContent.trim().slice(0, 30), (Math.max(a, b) + .05)/(Math.min(a, b) + .05)]; }).filter(x => x[1] < 3); }"""


def everything_has_a_name_and_is_reached_by_keyboard_fits_and_is_readable(page):
    for name in ('Portrait', 'Structure', 'Similarity', 'Attention'):
        tab(page, name)
        assert board(page).evaluate(NAMELESS) == []
        assert board(page).evaluate(PALE) == []
        assert board(page).evaluate('b => b.scrollWidth <= b.parentElement.clientWidth + 1'), name
    assert board(page).locator('img:visible').evaluate_all('l => l.filter(i => !i.alt).length') == 0
    button(page, 'Drop photographs').focus()
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.textContent') == 'a drawn person'


def it_is_readable_in_the_dark(page):
    page.get_by_role('menuitem', name='Settings', exact=True).click()
    page.get_by_text('Theme', exact=True).hover()
    page.get_by_text('JupyterLab Dark', exact=True).click()
    page.wait_for_function('document.body.dataset.jpThemeLight === "false"')
    page.wait_for_timeout(500)
    for name in ('Structure', 'Portrait'):
        tab(page, name)
        shot(page, f'dark-{name.lower()}')
        assert board(page).evaluate(PALE) == []


def the_cell_run_again_lets_go_of_the_old_board(page, home):
    from jupyter_client import BlockingKernelClient
    connection, = (home/'runtime').glob('kernel-*.json')
    client = BlockingKernelClient(connection_file=str(connection))
    client.load_connection_file()
    client.start_channels()
    def ask(what):
        reply = client.execute('', user_expressions=dict(it=what), reply=True, timeout=30)['content']['user_expressions']['it']
        return reply['data']['text/plain']
    try:
        assert ask('len(_boards)') == '1' and ask('_boards[0][2].studio._faceid is None') == 'False'
        ask('globals().update(old=_boards[0][2])')
        page.locator('.jp-Cell').last.locator('.cm-content').click()
        page.keyboard.press('Control+Enter')
        wait(page, lambda: 'person 24' not in board(page).inner_text() and button(page, 'Generate').count() == 1)
        page.wait_for_timeout(500)
        assert ask('len(_boards)') == '1' and ask('_boards[0][2] is old') == 'False' and ask('old.studio._faceid is None and old.studio.worker._thread is None or not old.studio.worker._thread.is_alive()') == 'True'
    finally: client.stop_channels()


def test_the_dashboards_in_jupyterlab(page, photographs, project, home, monkeypatch):
    "One visit, in this order: several workers would each open a page of their own."
    files = lambda: (project/'nbs').rglob('*')
    before = {f.relative_to(project/'nbs').parts[0] for f in files()}
    a_photograph_without_a_face_is_answered_and_the_controls_live(page, photographs)
    a_large_photograph_is_made_smaller_by_the_browser(page, photographs)
    drop_choose_generate_and_likeness(page, photographs)
    stop_in_the_middle_with_a_preview_and_again(page)
    controls_fit_the_variant(page)
    the_code_is_executed_and_a_saved_picture_restores_its_settings(page, project, photographs, monkeypatch)
    portraits_are_compared_and_kept(page)
    a_grid_is_filled_stopped_resumed_and_a_cell_enlarged(page, project)
    likeness_is_compared_surveyed_and_searched(page)
    attention_is_walked_through_by_keyboard(page)
    everything_has_a_name_and_is_reached_by_keyboard_fits_and_is_readable(page)
    it_is_readable_in_the_dark(page)
    the_cell_run_again_lets_go_of_the_old_board(page, home)
    assert {f.relative_to(project/'nbs').parts[0] for f in files()} - before <= {'portraits', '.ipynb_checkpoints'}, 'something was written elsewhere'
    assert not [u for u in page.asked if not re.match(r'(https?|wss?)://127\.0\.0\.1[:/]|data:|blob:', u)], 'the page asked another machine'
    assert not page.wrong and 'javascript error' not in board(page).inner_text(), page.wrong


def test_a_dashboard_in_voila(browser, tmp_path):
    "A page of one line, served without its source: a face is drawn, a portrait made."
    import nbformat
    pytest.importorskip('voila', reason='voila is not installed: pip install voila')
    port = free_port()
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('from faceid_nb.dashboard import portrait_dashboard\nportrait_dashboard()')])
    nb.metadata.kernelspec = dict(name='python3', display_name='Python 3', language='python')
    nbformat.write(nb, tmp_path/'portrait.ipynb')
    command = [sys.executable, '-m', 'voila', str(tmp_path/'portrait.ipynb'), '--no-browser', '--Voila.ip=127.0.0.1', f'--port={port}', f'--token={TOKEN}']
    with serving(command, port, tmp_path/'log', **jupyter_dirs(tmp_path)) as address:
        page = browser.new_page(viewport=dict(width=1280, height=900))
        page.set_default_timeout(60_000)
        page.goto(f'{address}/?token={TOKEN}')
        button(page, 'a drawn person').click(timeout=90_000)
        wait(page, lambda: 'person 24' in board(page).inner_text())
        set_slider(page, 'steps', 20)
        button(page, 'Generate').click()
        wait(page, lambda: len(likenesses(page)) == 4, 90)
        finished(page, 'Generate')
        assert board(page).evaluate(PALE) == [] and 'portrait_dashboard' not in page.locator('body').inner_text()
        shot(page, 'voila')
        board(page).screenshot(path=SHOTS/'dashboard_portrait.png')
        page.close()
