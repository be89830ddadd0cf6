"The dashboard in a real browser: JupyterLab on the loopback address, Chromium driven by Playwright."
import io, os, re, shutil, socket, subprocess, sys, time, urllib.request
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
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


@pytest.fixture(scope='module')
def lab(project, tmp_path_factory):
    "JupyterLab with folders of its own, serving a copy of the notebooks: its address."
    home, port = tmp_path_factory.mktemp('jupyter'), free_port(); dirs = {f'JUPYTER_{k}_DIR': str(home/k.lower()) for k in ('CONFIG', 'DATA', 'RUNTIME')} | dict(JUPYTERLAB_SETTINGS_DIR=str(home/'settings'), JUPYTERLAB_WORKSPACES_DIR=str(home/'workspaces'))
    (home/'settings'/'@jupyterlab'/'apputils-extension').mkdir(parents=True); (home/'settings'/'@jupyterlab'/'apputils-extension'/'notification.jupyterlab-settings').write_text('{"fetchNews": "false", "checkForUpdates": false}')
    (home/'settings'/'@jupyterlab'/'notebook-extension').mkdir(); (home/'settings'/'@jupyterlab'/'notebook-extension'/'tracker.jupyterlab-settings').write_text('{"windowingMode": "none"}')   # otherwise a cell out of sight leaves the page
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1', f'--ServerApp.port={port}', '--ServerApp.port_retries=0', f'--IdentityProvider.token={TOKEN}', f'--ServerApp.root_dir={project/"nbs"}']
    server = subprocess.Popen(command, env=environment(**dirs), stdout=open(home/'log', 'w'), stderr=subprocess.STDOUT)
    address = f'http://127.0.0.1:{port}'
    try:
        for _ in range(240):
            try: urllib.request.urlopen(f'{address}/api?token={TOKEN}', timeout=2); break
            except OSError: assert server.poll() is None, (home/'log').read_text()[-2000:]; time.sleep(.25)
        yield address
    finally: server.terminate(); server.wait(20)


@pytest.fixture(scope='module')
def page(lab):
    "The dashboard's page, run to its end."
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS); page = browser.new_page(viewport=dict(width=1280, height=1000)); page.set_default_timeout(60_000)
        page.goto(f'{lab}/lab/tree/17_dashboard.ipynb?token={TOKEN}'); page.locator('.jp-Notebook').wait_for()
        page.get_by_text('Python 3 (ipykernel) | Idle').wait_for(); page.wait_for_timeout(1000)
        for _ in range(3):   # a menu that is opened while the page settles may close again
            try:
                page.get_by_role('menuitem', name='Run', exact=True).click(timeout=10_000); page.get_by_text('Run All Cells', exact=True).click(timeout=10_000)
                page.locator('button:has-text("Generate")').first.wait_for(timeout=90_000); break
            except sync_api.TimeoutError: shot(page, 'not-started'); page.keyboard.press('Escape')
        else: raise AssertionError('the page did not run: see not-started.png')
        yield page
        browser.close()


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    from PIL import Image
    from faceid_nb.tiny.people import render, sample_people
    folder = tmp_path_factory.mktemp('photographs'); a, b = (p.image for p in render(sample_people(2, 7), seed=1, size=160, hat=None, glasses=0))
    both = Image.new('RGB', (320, 160)); both.paste(a, (0, 0)); both.paste(b.resize((120, 120)), (180, 20)); both.save(folder/'two.png'); a.save(folder/'one.png'); Image.new('RGB', (96, 96), 'blue').save(folder/'wall.png'); return folder


def shot(page, name): SHOTS.mkdir(parents=True, exist_ok=True); page.screenshot(path=SHOTS/f'{name}.png')
def wait(page, what, seconds=60):
    "Until `what` holds."
    end = time.time() + seconds
    while not what(): assert time.time() < end, page.locator('.jp-OutputArea').last.inner_text()[-600:]; page.wait_for_timeout(50)
def board(page): return page.locator('.jp-OutputArea-output:has(button:has-text("Generate"))').last
def button(page, text): return board(page).locator(f'button:has-text("{text}")')
def set_slider(page, label, value):
    box = board(page).locator(f'.widget-hslider:has-text("{label}") .widget-readout'); box.fill(str(value)); box.press('Enter')
def upload(page, path):
    with page.expect_file_chooser() as chooser: button(page, 'Photograph').click()
    chooser.value.set_files(path)
def likenesses(page): return re.findall(r'likeness (-?\d\.\d\d)', board(page).inner_text())


def a_photograph_without_a_face_is_answered_and_the_controls_live(page, photographs):
    upload(page, photographs/'wall.png'); alert = board(page).get_by_role('alert'); alert.wait_for(); assert "No face was found in 'wall.png'" in alert.inner_text(); shot(page, 'no-face')
    button(page, 'Generate').click(); wait(page, lambda: 'Add a photograph' in alert.inner_text())


def upload_choose_generate_and_likeness(page, photographs):
    upload(page, photographs/'two.png'); wait(page, lambda: 'two.png' in board(page).inner_text()); assert not board(page).get_by_role('alert').count()
    second = board(page).locator('.widget-toggle-buttons button').nth(1); second.click(); wait(page, lambda: 'mod-active' in (second.get_attribute('class') or ''))
    set_slider(page, 'steps', 12); set_slider(page, 'pictures', 2); go, stop = (button(page, n) for n in ('Generate', 'Stop')); assert stop.is_disabled()
    go.click(); wait(page, lambda: re.search(r'step \d+ of 12', board(page).inner_text()) or len(likenesses(page)) == 2); wait(page, lambda: len(likenesses(page)) == 2); wait(page, lambda: go.is_enabled() and stop.is_disabled())
    assert '2 made in' in board(page).inner_text() and 'cpu' in board(page).inner_text(); board(page).scroll_into_view_if_needed(); shot(page, 'portraits')


def stop_in_the_middle_with_a_preview_and_again(page):
    set_slider(page, 'steps', 100); go, stop = (button(page, n) for n in ('Generate', 'Stop')); go.click()
    wait(page, lambda: board(page).locator('.faceid-preview img').count() == 2); shot(page, 'preview'); began = time.time(); stop.click(); wait(page, lambda: go.is_enabled(), 20); assert time.time() - began < 15 and 'stopped' in board(page).inner_text() and len(likenesses(page)) == 2
    set_slider(page, 'steps', 4); go.click(); wait(page, lambda: len(likenesses(page)) == 4)


def structure_is_only_where_it_exists(page):
    model, box = board(page).locator('select').first, board(page).locator('.widget-hslider:has-text("structure") .widget-readout')
    assert box.get_attribute('contenteditable') == 'true'; model.select_option('tiny-faceid'); wait(page, lambda: box.get_attribute('contenteditable') != 'true'); model.select_option('tiny-plusv2'); wait(page, lambda: box.get_attribute('contenteditable') == 'true')


def the_code_is_shown_and_a_picture_is_saved(page, project):
    button(page, 'code').first.click(); text = board(page).locator('textarea:disabled'); wait(page, lambda: 'model.generate(' in text.input_value()); assert "read('two.png')[1]" in text.input_value()
    button(page, 'save').first.click(); wait(page, lambda: 'saved as portraits' in board(page).inner_text()); files = list((project/'nbs'/'portraits').glob('*.png')); assert len(files) == 1
    from faceid_nb.faceid import read_record
    assert read_record(files[0])['settings']['model'] == 'tiny-plusv2'


def test_the_portrait_dashboard(page, photographs, project):
    "One visit, in this order: several workers would each open a page of their own."
    a_photograph_without_a_face_is_answered_and_the_controls_live(page, photographs)
    upload_choose_generate_and_likeness(page, photographs)
    stop_in_the_middle_with_a_preview_and_again(page)
    structure_is_only_where_it_exists(page)
    the_code_is_shown_and_a_picture_is_saved(page, project)
