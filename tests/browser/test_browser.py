"The dashboards in a real browser: JupyterLab and Voila on the loopback address, Chromium by Playwright."
import re
import shutil
import statistics
import time

import nbformat
import numpy as np
import pytest
from browser_board import SHOTS, BoardPage, script
from helpers_studio import drawn, executed, largest_difference, two_faces
from PIL import Image
from servers import TOKEN, jupyterlab, voila

from faceid_nb.files import read_record

MISSING = 'playwright is not installed: pip install playwright'
sync_api = pytest.importorskip('playwright.sync_api', reason=MISSING)
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='no Chromium here: apt-get install chromium')
FLAGS = ('--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
         '--disable-component-update --disable-sync').split()
TABS = 'Portrait', 'Structure', 'Similarity', 'Attention'
OURS = re.compile(r'(https?|wss?)://127\.0\.0\.1[:/]|data:|blob:')
IDLE = 'Python 3 (ipykernel) | Idle'


# the page

@pytest.fixture(scope='module')
def home(tmp_path_factory): return tmp_path_factory.mktemp('jupyter')


@pytest.fixture(scope='module')
def lab(project, home):
    "JupyterLab, serving a copy of the notebooks: its address."
    with jupyterlab(project/'nbs', home) as address: yield address


@pytest.fixture(scope='module')
def browser():
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def run_all_cells(page):
    "A menu that is opened while the page settles may close again: three attempts."
    for _ in range(3):
        try:
            page.get_by_role('menuitem', name='Run', exact=True).click(timeout=10_000)
            page.get_by_text('Run All Cells', exact=True).click(timeout=10_000)
            page.locator('button:has-text("Generate")').first.wait_for(timeout=90_000)
            return
        except sync_api.TimeoutError:
            BoardPage(page).shot('not-started')
            page.keyboard.press('Escape')
    raise AssertionError('the page did not run: see not-started.png')


@pytest.fixture(scope='module')
def page(lab, browser):
    "The dashboards' page, run to its end; it notes its errors and what it asks for."
    page = browser.new_page(viewport=dict(width=1280, height=1000))
    page.set_default_timeout(30_000)
    page.wrong, page.asked = [], set()
    page.on('pageerror', lambda e: page.wrong.append(str(e)))
    page.on('request', lambda r: page.asked.add(r.url))
    page.goto(f'{lab}/lab/tree/studio/44_dashboard.ipynb?token={TOKEN}')
    page.locator('.jp-Notebook').wait_for()
    page.get_by_text(IDLE).wait_for()
    page.wait_for_timeout(1000)
    run_all_cells(page)
    page.get_by_text(IDLE).wait_for()
    yield page
    page.close()


@pytest.fixture(scope='module')
def board(page): return BoardPage(page)


@pytest.fixture(scope='module')
def folder(project):
    "Beside the page: the only place that is written to."
    return project/'nbs'/'studio'/'portraits'


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    "A picture of two faces, one of none, and one that is too large for the line."
    folder = tmp_path_factory.mktemp('photographs')
    two_faces().save(folder/'two.png')
    Image.new('RGB', (96, 96), 'blue').save(folder/'wall.png')
    noise = np.random.default_rng(0).integers(0, 40, (1500, 1500, 3))
    large = np.asarray(drawn(1)[0].resize((1500, 1500)), int)//2 + noise
    Image.fromarray(large.astype(np.uint8)).save(folder/'large.png')
    return folder


# what is visited, in this order

def a_photograph_without_a_face_is_answered(board, photographs):
    board.upload(photographs/'wall.png')
    board.alert.wait_for()
    assert "No face was found in 'wall.png'" in board.alert.inner_text()
    board.shot('no-face')


def the_controls_live_after_an_error(board):
    board.press('Generate')
    board.wait(lambda: 'Add a photograph' in board.alert.inner_text())


def a_large_photograph_is_made_smaller_by_the_browser(board, photographs):
    assert (photographs/'large.png').stat().st_size > 4e6
    board.upload(photographs/'large.png')
    board.wait_for_text('large.png')
    assert not board.alert.count()
    board.press('remove')
    board.wait(lambda: 'large.png' not in board.text)


def a_photograph_is_dropped(board, photographs):
    board.drop(photographs/'two.png')
    board.wait_for_text('two.png')
    assert not board.alert.count()


def a_face_is_chosen_by_a_click_and_by_its_number(board):
    first, second = (board.find('.widget-toggle-buttons button').nth(i) for i in (0, 1))
    tile = board.find('button.faceid-tile:has(img[alt^="two.png"])')
    def chosen(): return 'mod-active' in (second.get_attribute('class') or '')
    box = tile.locator('img').bounding_box()
    tile.click(position=dict(x=.8*box['width'], y=.5*box['height']))
    board.wait(chosen)
    first.click()
    board.wait(lambda: not chosen())
    second.click()
    board.wait(chosen)


def portraits_are_made_with_progress_and_likeness(board):
    board.set_slider('steps', 12)
    board.set_slider('pictures', 2)
    assert board.button('Stop').is_disabled()
    board.press('Generate')
    board.wait(lambda: re.search(r'step \d+ of 12', board.text) or len(board.likenesses) == 2)
    board.wait(lambda: len(board.likenesses) == 2)
    board.wait(lambda: board.button('Generate').is_enabled() and board.button('Stop').is_disabled())
    assert '2 made in' in board.text


def the_machine_is_told(board):
    device, memory = r'(cpu|cuda\S*), float\d+', r'memory \d+\.\d of \d+ GB'
    faces, files = r'faces: \w+ExecutionProvider', 'files go into portraits/'
    assert re.search(rf'{device} \| {memory} \| {faces} \| {files}', board.text)


def previews_are_shown_while_it_works(board):
    board.set_slider('steps', 200)
    board.press('Generate')
    board.wait(lambda: board.pictures('.faceid-preview').count() == 2)
    board.shot('preview')


def a_click_is_answered_while_it_works(board):
    seed, dice = board.field('seed'), board.find('button[title="another seed"]')
    handles = [dice.element_handle(), seed.element_handle()]
    took = statistics.median(board.page.evaluate(script('answer'), handles) for _ in range(5))
    assert board.button('Stop').is_enabled(), 'it ended before the controls were tried'
    print(f'a click is answered in {took:.0f} ms while it generates (median of 5)')
    assert took < 500


def it_is_stopped_in_the_middle(board):
    began = time.time()
    board.press('Stop')
    board.wait(lambda: board.button('Generate').is_enabled(), 20)
    assert time.time() - began < 15 and 'stopped' in board.text and len(board.likenesses) == 2


def it_begins_again_after_a_stop(board):
    board.enter('seed', 0)
    board.set_slider('steps', 4)
    board.press('Generate')
    board.wait(lambda: len(board.likenesses) == 4)
    board.wait_for_end('Generate')


def controls_fit_the_variant(board):
    model, structure = board.field('model'), board.slider('structure')
    assert structure.count() == 1
    model.select_option('tiny-faceid')
    board.wait(lambda: structure.count() == 0)
    model.select_option('tiny-plusv2')
    board.wait(lambda: structure.count() == 1)


def nothing_is_downloaded_unasked(board):
    board.field('model').select_option('sd15-plusv2 (download)')
    board.wait_for_text('download of 4.7 GB or more')
    board.wait_for_text('non-commercial research only')
    board.press('Generate')
    board.wait(lambda: 'is not on this machine' in board.alert.inner_text())
    board.field('model').select_option('tiny-plusv2')
    board.wait(lambda: board.slider('structure').count() == 1)


def a_portrait_is_saved(board, folder):
    board.button('save').last.click()
    board.wait_for_text('saved as portraits')
    file, = folder.glob('*.png')
    assert read_record(file)['settings']['model'] == 'tiny-plusv2'
    return file


def its_code_makes_the_same_picture(board, file, photographs, monkeypatch):
    board.button('code').last.click()
    code = board.find('.faceid-code pre:visible')
    board.wait(lambda: 'model.generate(' in code.inner_text())
    assert "read('two.png')[1]" in code.inner_text()
    with monkeypatch.context() as m:
        m.chdir(photographs)
        picture = executed(code.inner_text())['picture']
    with Image.open(file) as saved: assert largest_difference(saved, picture) <= 2


def a_saved_portrait_restores_its_settings(board, file):
    board.enter('prompt', 'something else', 'Tab')
    board.set_slider('identity', .3)
    board.drop(file)
    board.wait(lambda: board.field('prompt').input_value() == 'photo of a person, smiling')
    board.wait(lambda: 'settings restored' in board.text)      # said after the last setting
    board.wait(lambda: board.slider_value('identity') == '1.00')


def portraits_are_compared_by_click_and_by_keyboard(board):
    tiles, beside = board.find('.faceid-gallery button.faceid-tile'), board.find('.faceid-beside')
    tiles.nth(0).click()
    tiles.nth(1).focus()
    board.page.keyboard.press('Enter')
    board.wait(lambda: board.pictures('.faceid-beside').count() == 3)
    assert 'likeness' in beside.inner_text() and 'seed' in beside.inner_text()
    board.board.scroll_into_view_if_needed()
    board.shot('portraits')


def what_is_not_kept_is_cleared(board):
    tiles = board.find('.faceid-gallery button.faceid-tile')
    before = tiles.count()
    board.button('keep').first.click()
    board.press('clear')
    board.wait(lambda: tiles.count() == 1 < before)


def values_that_are_wrong_are_said(board):
    board.tab('Structure')
    board.enter('s_scales', '0, x')
    board.wait(lambda: 'takes numbers' in board.alert.inner_text())
    board.enter('s_scales', '0, 1, 2')
    board.wait(lambda: not board.alert.count())


def a_grid_is_filled_with_previews_and_stopped(board):
    board.set_slider('steps', 40)
    board.enter('seeds', '0, 1, 2, 3')
    board.press('Fill the grid')
    board.wait(lambda: board.find('.faceid-grid button.faceid-tile').count() == 12)
    board.wait(lambda: board.pictures('.faceid-grid .dim').count())
    board.wait(lambda: board.cells_done >= 3)
    board.press('Stop')
    board.wait(lambda: board.button('Resume').count() and board.button('Resume').is_enabled())
    assert 3 <= board.cells_done < 12 and 'cells to go' in board.text
    board.shot('grid-stopped')


def a_grid_is_resumed(board, folder):
    board.press('Resume')
    board.wait(lambda: board.cells_done == 12, 120)
    board.wait_for_end('Fill the grid')
    assert '12 cells' in board.text and len(list((folder/'sweeps'/'pictures').glob('*.png'))) == 12


def a_long_grid_scrolls_by_itself(board):
    scroll = board.find('.faceid-scroll:visible')
    board.board.evaluate('e => e.scrollIntoView()')
    scroll.evaluate('e => { e.scrollTop = 1e6; }')
    assert scroll.evaluate('e => e.scrollTop > 0 && e.getBoundingClientRect().bottom <= innerHeight + 1')
    sync_api.expect(board.board.get_by_text('files go into portraits/')).to_be_in_viewport()


def a_cell_is_enlarged(board):
    cell = board.find('.faceid-grid button.faceid-tile').nth(4)
    cell.click()
    board.wait(lambda: board.pictures('.faceid-large').count() == 2)
    board.wait(lambda: 'structure distance' in board.find('.faceid-large').inner_text())
    assert cell.get_attribute('aria-pressed') == 'true'


def a_grid_is_exported(board, folder):
    board.press('Export')
    board.wait_for_text('written: portraits')
    names = {f.name for f in folder.glob('grid*')}
    assert names == {'grid_0001.png', 'grid_0001.csv', 'grid_0001_curves.png'}
    board.board.scroll_into_view_if_needed()
    board.shot('structure')
    board.picture('structure')


def figures(board):
    "How many of three figures of the similarity are there."
    alts = 'heat map', 'mean likeness', 'against'
    return board.find(', '.join(f'.faceid-tile img[alt*="{alt}"]:visible' for alt in alts)).count()


def people_are_compared(board):
    board.tab('Similarity')
    board.set_slider('steps', 8)
    board.press('a drawn person')
    board.wait_for_text('person 24')
    board.press('Compare people')
    board.wait_for_end('Compare people')
    board.wait(lambda: figures(board) == 1)


def weights_are_surveyed(board):
    board.enter('scales', '0.5, 1')
    board.press('Survey')
    board.wait_for_end('Survey')
    board.wait(lambda: figures(board) == 3)


def weights_are_searched_and_used(board):
    board.set_slider('target', .2)
    board.press('Find')
    board.wait_for_end('Find')
    board.wait_for_text('a likeness of 0.20 is')
    board.press('use them')
    scale = float(re.search(r'at scale (\d\.?\d*)', board.text)[1])
    board.wait(lambda: float(board.slider_value('identity')) == scale)
    shown = board.field('weights').evaluate('e => e.selectedOptions[0].text').replace('\xa0', ' ')
    assert f'scale {scale:g},' in shown
    board.shot('similarity')
    board.picture('similarity')


def attention_is_made(board):
    board.tab('Attention')
    board.press('Make and look')
    board.wait_for_end('Make and look')
    board.wait(lambda: board.pictures('.faceid-maps').count() == 5)


def attention_is_walked_through_by_keyboard(board):
    token = board.pictures('.faceid-maps').nth(1)
    first, keyboard = token.get_attribute('src'), board.page.keyboard
    board.slider('layer').locator('[role=slider]').focus()
    keyboard.press('ArrowRight')
    board.wait(lambda: 'layer down' in board.text and token.get_attribute('src') != first)
    board.slider('step').locator('[role=slider]').last.focus()
    keyboard.press('ArrowRight')
    board.wait_for_text(', step 1')
    board.shot('attention')
    board.picture('attention')


def everything_has_a_name_fits_and_is_readable(board):
    for name in TABS:
        board.tab(name)
        assert board.nameless == [] and board.pale == [], name
        assert board.fits, name
    assert board.find('img:visible').evaluate_all('l => l.filter(i => !i.alt).length') == 0


def the_tab_key_goes_through_the_controls(board):
    board.button('Drop photographs').focus()
    board.page.keyboard.press('Tab')
    assert board.page.evaluate('document.activeElement.textContent') == 'a drawn person'


def it_is_readable_in_the_dark(board):
    page = board.page
    page.get_by_role('menuitem', name='Settings', exact=True).click()
    page.get_by_text('Theme', exact=True).hover()
    page.get_by_text('JupyterLab Dark', exact=True).click()
    page.wait_for_function('document.body.dataset.jpThemeLight === "false"')
    page.wait_for_timeout(500)
    for name in ('Structure', 'Portrait'):
        board.tab(name)
        board.shot(f'dark-{name.lower()}')
        assert board.pale == []


class Kernel:
    "The kernel behind the page, asked for the values of expressions."
    def __init__(self, home):
        from jupyter_client import BlockingKernelClient   # the page's part of Jupyter, not ours
        connection, = (home/'runtime').glob('kernel-*.json')
        self.client = BlockingKernelClient(connection_file=str(connection))
    def __enter__(self):
        self.client.load_connection_file()
        self.client.start_channels()
        return self
    def __exit__(self, *error): self.client.stop_channels()
    def ask(self, what):
        given = dict(user_expressions=dict(it=what), reply=True, timeout=30)
        reply = self.client.execute('', **given)['content']['user_expressions']['it']
        return reply['data']['text/plain']


def run_last_cell(board):
    board.page.locator('.jp-Cell:has(.faceid-board)').last.locator('.cm-content').click()
    board.page.keyboard.press('Control+Enter')
    board.wait(lambda: 'person 24' not in board.text and board.button('Generate').count() == 1)
    board.page.wait_for_timeout(500)


def the_cell_run_again_lets_go_of_the_old_board(board, home):
    with Kernel(home) as kernel:
        assert kernel.ask('len(_boards)') == '1'
        assert kernel.ask('_boards[0][2].studio.engine.faceid is None') == 'False'
        kernel.ask('globals().update(old=_boards[0][2])')
        run_last_cell(board)
        assert kernel.ask('len(_boards)') == '1' and kernel.ask('_boards[0][2] is old') == 'False'
        assert kernel.ask('old.studio.engine.faceid is None and not old.studio.worker.busy') == 'True'


def beside_the_pages(project): return {f.relative_to(project/'nbs') for f in (project/'nbs').rglob('*')}


def nothing_is_written_elsewhere(project, before):
    for path in beside_the_pages(project) - before:
        assert path.parts[:2] == ('studio', 'portraits') or '.ipynb_checkpoints' in path.parts, path


def nothing_is_asked_of_another_machine(page): assert [url for url in page.asked if not OURS.match(url)] == []


def no_script_has_failed(page, board):
    assert not page.wrong and 'javascript error' not in board.text, page.wrong


def test_the_dashboards_in_jupyterlab(page, board, photographs, project, folder, home, monkeypatch):
    "One visit, in this order: several workers would each open a page of their own."
    before = beside_the_pages(project)
    a_photograph_without_a_face_is_answered(board, photographs)
    the_controls_live_after_an_error(board)
    a_large_photograph_is_made_smaller_by_the_browser(board, photographs)
    a_photograph_is_dropped(board, photographs)
    a_face_is_chosen_by_a_click_and_by_its_number(board)
    portraits_are_made_with_progress_and_likeness(board)
    the_machine_is_told(board)
    previews_are_shown_while_it_works(board)
    a_click_is_answered_while_it_works(board)
    it_is_stopped_in_the_middle(board)
    it_begins_again_after_a_stop(board)
    controls_fit_the_variant(board)
    nothing_is_downloaded_unasked(board)
    file = a_portrait_is_saved(board, folder)
    its_code_makes_the_same_picture(board, file, photographs, monkeypatch)
    a_saved_portrait_restores_its_settings(board, file)
    portraits_are_compared_by_click_and_by_keyboard(board)
    what_is_not_kept_is_cleared(board)
    values_that_are_wrong_are_said(board)
    a_grid_is_filled_with_previews_and_stopped(board)
    a_grid_is_resumed(board, folder)
    a_long_grid_scrolls_by_itself(board)
    a_cell_is_enlarged(board)
    a_grid_is_exported(board, folder)
    people_are_compared(board)
    weights_are_surveyed(board)
    weights_are_searched_and_used(board)
    attention_is_made(board)
    attention_is_walked_through_by_keyboard(board)
    everything_has_a_name_fits_and_is_readable(board)
    the_tab_key_goes_through_the_controls(board)
    it_is_readable_in_the_dark(board)
    the_cell_run_again_lets_go_of_the_old_board(board, home)
    nothing_is_written_elsewhere(project, before)
    nothing_is_asked_of_another_machine(page)
    no_script_has_failed(page, board)


@pytest.fixture
def served(browser, tmp_path):
    "A page of one line, served by Voila without its source."
    pytest.importorskip('voila', reason='voila is not installed: pip install voila')
    source = 'from faceid_nb.dashboard import portrait_dashboard\nportrait_dashboard()'
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nb.metadata.kernelspec = dict(name='python3', display_name='Python 3', language='python')
    nbformat.write(nb, tmp_path/'portrait.ipynb')
    with voila(tmp_path/'portrait.ipynb', tmp_path) as address:
        page = browser.new_page(viewport=dict(width=1280, height=900))
        page.set_default_timeout(60_000)
        page.goto(f'{address}/?token={TOKEN}')
        yield BoardPage(page)
        page.close()


def test_a_dashboard_in_voila(served):
    "A face is drawn, a portrait made."
    served.button('a drawn person').click(timeout=90_000)
    served.wait_for_text('person 24')
    served.set_slider('steps', 20)
    served.press('Generate')
    served.wait(lambda: len(served.likenesses) == 4, 90)
    served.wait_for_end('Generate')
    assert served.pale == [] and 'portrait_dashboard' not in served.page.locator('body').inner_text()
    served.shot('voila')
    served.board.screenshot(path=SHOTS/'dashboard_portrait.png')
