"A board in a browser: what is on it, and what a user does with it."
import os
import re
import time
from base64 import b64encode
from pathlib import Path

from conftest import ROOT

SHOTS = Path(os.environ.get('FACEID_SCREENSHOTS', ROOT/'out'/'screenshots'))   # looked at, and kept by CI
SCRIPTS = Path(__file__).parent/'browser'


def script(name):
    "A function of JavaScript, as Playwright takes it: without its comment and the last semicolon."
    text = (SCRIPTS/f'{name}.js').read_text(encoding='utf-8')
    return text.partition('\n')[2].strip().removesuffix(';')


class BoardPage:
    "The last board on a page."
    def __init__(self, page): self.page = page
    # what is there
    @property
    def board(self): return self.page.locator('.faceid-board').last
    @property
    def text(self): return self.board.inner_text()
    @property
    def alert(self): return self.board.get_by_role('alert')
    @property
    def likenesses(self): return re.findall(r'likeness (-?\d\.\d\d)\nseed', self.text)
    @property
    def cells_done(self):
        return len(re.findall(r'-?\d\.\d\d / \d\.\d\d', self.find('.faceid-grid').inner_text()))
    def find(self, selector): return self.board.locator(selector)
    def button(self, text): return self.find(f'button:has-text("{text}"):visible')
    def field(self, label): return self.board.get_by_label(label, exact=True).locator('visible=true')
    def slider(self, label): return self.find(f'.widget-hslider:has-text("{label}"):visible')
    def slider_value(self, label): return self.slider(label).locator('.widget-readout').inner_text()
    def pictures(self, place): return self.find(f'{place} img:visible')
    # what is done
    def tab(self, name):
        self.page.get_by_role('tab', name=name).click()
        self.page.wait_for_timeout(200)
    def press(self, text): self.button(text).click()
    def set_slider(self, label, value):
        box = self.slider(label).locator('.widget-readout')
        box.fill(str(value))
        box.press('Enter')
    def enter(self, label, value, key='Enter'):
        self.field(label).fill(str(value))
        self.field(label).press(key)
    def upload(self, path):
        with self.page.expect_file_chooser() as chooser: self.press('Drop photographs')
        chooser.value.set_files(path)
    def drop(self, path):
        "As from a file manager."
        data = b64encode(path.read_bytes()).decode()
        files = self.page.evaluate_handle(script('drop'), [path.name, data])
        for kind in ('dragenter', 'dragover', 'drop'):
            self.button('Drop photographs').dispatch_event(kind, dict(dataTransfer=files))
    # waiting and looking
    def wait(self, condition, seconds=60):
        "Until condition() holds."
        end = time.time() + seconds
        while not condition():
            if time.time() > end:
                self.shot('waited-in-vain')
                raise AssertionError(self.text[-800:])
            self.page.wait_for_timeout(50)
    def wait_for_text(self, text, seconds=60): self.wait(lambda: text in self.text, seconds)
    def wait_for_end(self, text, seconds=90):
        "Until a button that begins work can be pressed again."
        self.page.wait_for_timeout(100)
        self.wait(lambda: self.button(text).first.is_enabled(), seconds)
    def shot(self, name):
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS/f'{name}.png')
    def picture(self, name):
        "The board alone, for README and notebook."
        view = self.page.viewport_size
        self.page.set_viewport_size(dict(width=1280, height=1900))
        self.board.scroll_into_view_if_needed()
        self.page.wait_for_timeout(200)
        self.board.screenshot(path=SHOTS/f'dashboard_{name}.png')
        self.page.set_viewport_size(view)
    # what a script finds
    @property
    def nameless(self): return self.board.evaluate(script('nameless'))
    @property
    def pale(self): return self.board.evaluate(script('pale'))
    @property
    def fits(self): return self.board.evaluate('b => b.scrollWidth <= b.parentElement.clientWidth + 1')
