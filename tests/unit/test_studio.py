"The studio: rules, one worker, stop, errors, code and restored settings, without a browser."
import math
import threading
import time
from dataclasses import replace

import pytest
from helpers_studio import (drawn, empty, executed, finish, largest_difference, made, png, raising,
                            two_faces)
from PIL import Image
from traitlets import TraitError

from faceid_nb import studio as S
from faceid_nb.errors import ArgumentError
from faceid_nb.measure import identity_similarity
from faceid_nb.studio import RANGES, Portrait, Settings, Studio, Worker


@pytest.fixture(scope='module')
def photo(): return png(drawn(1)[0])


@pytest.fixture(scope='module')
def two(): return png(two_faces())


@pytest.fixture(scope='module')
def shared():
    "A studio that has loaded its model once; each test gets it empty."
    studio = Studio(model='tiny-faceid', num_samples=1, num_inference_steps=2)
    yield studio
    studio.close()


@pytest.fixture
def studio(shared, photo, tmp_path):
    empty(shared, tmp_path/'portraits')
    shared.entrance.add(photo, 'me.png')
    return shared


@pytest.fixture
def long(studio):
    "At work on something that takes seconds; stopped afterwards."
    studio.settings.num_inference_steps = 200
    studio.generate()
    while studio.progress.step < 2 and studio.worker.busy: time.sleep(.005)
    yield studio
    studio.worker.stop()
    assert studio.worker.wait(20)


# the worker

def test_one_thing_at_a_time():
    worker, gate = Worker(), threading.Event()
    assert worker.start(lambda: gate.wait(5)) and worker.busy
    assert not worker.start(lambda: None)
    gate.set()
    assert worker.wait(5) and not worker.busy


def test_another_thing_afterwards():
    worker = Worker()
    for _ in range(2): assert worker.start(lambda: None) and worker.wait(5)


@pytest.mark.parametrize('error, said', [
    (ArgumentError('It is wrong', 'this', 'Do that'), 'It is wrong. this. Do that.'),
    (ValueError('x'*999), 'ValueError: xxx'),
    (MemoryError(), 'not enough memory'),
    (RuntimeError('CUDA out of memory. Tried'), 'not enough memory'),
])
def test_errors_become_values(error, said):
    worker = Worker()
    worker.start(raising(error))
    worker.wait(5)
    assert said in worker.error and len(worker.error) < 400 and not worker.busy


def test_errors_go_away_with_the_next_thing():
    worker = Worker(error='wrong')
    worker.start(lambda: None)
    worker.wait(5)
    assert worker.error == ''


def test_stop_returns_at_once():
    worker = Worker()
    worker.start(lambda: worker.stopping.wait(5))
    began = time.time()
    worker.stop()
    assert time.time() - began < .1 and worker.wait(2)


def test_a_stopped_worker_begins_again():
    worker = Worker()
    worker.stop()
    seen = []
    worker.start(lambda: seen.append(worker.stopping.is_set()))
    assert worker.wait(2) and seen == [False]


# rules

@pytest.mark.parametrize('name', RANGES)
def test_the_ends_of_a_range_are_taken(name):
    settings = Settings()
    kind = type(getattr(settings, name))
    for value in map(kind, RANGES[name]):
        settings.set_trait(name, value)
        assert getattr(settings, name) == value


@pytest.mark.parametrize('name', RANGES)
def test_what_is_out_of_range_is_refused_and_changes_nothing(name):
    settings, (low, high) = Settings(), RANGES[name]
    before = getattr(settings, name)
    for value in (low - 1, high + 1):
        with pytest.raises(TraitError, match=f'{name} is from'): settings.set_trait(name, type(before)(value))
    assert getattr(settings, name) == before


def test_a_model_that_is_none():
    with pytest.raises(TraitError, match='tiny-faceid'): Settings(model='tiny-x')


def test_what_is_asked_fits_the_variant():
    assert 's_scale' in Settings(model='tiny-plusv2').asked()
    assert 's_scale' not in Settings(model='tiny-plus').asked()


def test_a_variant_says_what_it_has():
    assert Settings(model='sdxl-plusv2').has_structure and Settings(model='tiny-portrait').several


def test_a_negative_prompt_is_asked_where_there_is_one():
    assert 'negative_prompt' not in Settings().asked()
    assert Settings(negative_prompt='x').asked()['negative_prompt'] == 'x'


def test_settings_are_taken_all_or_none():
    settings = Settings(scale=.3)
    with pytest.raises(TraitError): settings.take(dict(scale=.5, seed=-1))
    assert settings.scale == .3


def test_another_seed():
    settings = Settings()
    seeds = {settings.seed}
    for _ in range(3):
        settings.roll()
        seeds.add(settings.seed)
    assert len(seeds) == 4


def test_no_widgets_are_imported(fresh):
    heavy = '("ipywidgets", "anywidget", "diffusers", "insightface")'
    source = f'print([m for m in sys.modules if m.split(".")[0] in {heavy}])'
    assert fresh(f'import faceid_nb.experiments, faceid_nb.studio, sys; {source}').strip() == '[]'


# photographs

def test_faces_are_found_the_largest_first(studio, two):
    photo = studio.entrance.add(two, 'two.png')
    assert len(photo.faces) == 2 and photo.chosen == 0 and photo.faces[0].size > photo.faces[1].size
    assert len(studio.people.photographs) == 2


def test_another_face_is_chosen_and_told(studio, two):
    heard, photo = [], studio.entrance.add(two, 'two.png')
    studio.people.observe(lambda change: heard.append(1), 'photographs')
    studio.people.choose(photo, 1)
    assert photo.face is photo.faces[1] and heard == [1]


@pytest.mark.parametrize('index', [2, -1])
def test_a_face_that_is_not_there_is_not_chosen(studio, two, index):
    photo = studio.entrance.add(two, 'two.png')
    with pytest.raises(S.FaceIDError, match=f'There is no face {index} on two.png; it has 2.'):
        studio.people.choose(photo, index)
    assert photo.chosen == 0


def test_a_photograph_is_removed(studio, two):
    studio.people.remove(studio.entrance.add(two, 'two.png'))
    assert [p.name for p in studio.people.photographs] == ['me.png']


@pytest.mark.parametrize('bad, said', [
    (png(Image.new('RGB', (64, 64), 'blue')), "No face was found in 'bad.png'"),
    (png(Image.new('RGB', (64, 64), 'red')), 'Real people need a model such as sd15-plusv2'),
    (b'x', 'not a picture'),
    ('/no/such/file.png', 'file.png'),
])
def test_bad_photographs_are_said_and_not_kept(studio, bad, said):
    assert studio.entrance.add(bad, 'bad.png') is None
    assert said in studio.worker.error and len(studio.people.photographs) == 1


def test_without_a_photograph_nothing_begins(studio):
    studio.people.photographs = []
    assert not studio.generate()
    assert 'Add a photograph' in studio.worker.error and not studio.worker.busy


def test_a_photograph_takes_the_error_away_and_has_a_name(studio, photo):
    studio.people.photographs, studio.worker.error = [], 'wrong'
    studio.entrance.add(photo)
    assert studio.worker.error == '' and studio.people.photographs[0].name == 'photograph 1'


def test_without_a_prompt_nothing_begins(studio):
    studio.settings.prompt = '  '
    assert not studio.generate() and 'prompt' in studio.worker.error


@pytest.mark.parametrize('place, face', [((250, 90), 1), ((70, 80), 0)])
def test_a_face_is_found_where_it_is_clicked(studio, two, place, face):
    assert studio.entrance.add(two, 'two.png').nearest(*place) == face


# generating

def heard_while(studio, names, work=made):
    "What the progress told while something was made: (name, value)."
    heard = []
    studio.progress.observe(lambda change: heard.append((change.name, change.new)), names)
    work(studio)
    return heard


def test_steps_and_previews_are_told(studio):
    studio.settings.num_samples, studio.settings.num_inference_steps = 2, 4
    studio.progress.preview_every = 2
    heard = heard_while(studio, ['step', 'preview'])
    assert [v for name, v in heard if name == 'step' and v] == [1, 2, 3, 4]
    assert [len(v) for name, v in heard if name == 'preview'] == [2, 2, 0]
    assert studio.progress.preview == [] and studio.worker.error == ''


def test_what_is_left_is_estimated(studio):
    studio.settings.num_inference_steps = 4
    left = [v for _, v in heard_while(studio, ['seconds_left'])]
    assert left[-1] == 0 and all(v >= 0 for v in left if not math.isnan(v))


def test_portraits_have_their_seeds_and_measurements(studio):
    studio.settings.num_samples = 2
    portraits = made(studio)
    assert [p.settings['seed'] for p in portraits] == [0, 1]
    assert all(-1 < p.likeness < 1 and p.distance >= 0 for p in portraits)
    assert studio.progress.status.startswith('2 made in')


def test_the_likeness_is_the_judges(studio):
    portrait, face = made(studio)[0], studio.people.photographs[0].face
    assert abs(portrait.likeness - identity_similarity(face, portrait.image)[0]) < 1e-5


def test_newer_portraits_stand_before_older_ones(studio):
    first = made(studio)[0]
    again = made(studio)
    assert len(again) == 2 and again[1] is first


def test_stop_ends_it_after_a_step(long):
    began = time.time()
    long.worker.stop()
    assert time.time() - began < .1 and long.worker.wait(20)
    assert 2 <= long.progress.step < 190 and long.progress.status == 'stopped'
    assert long.gallery.portraits == [] and long.worker.error == ''


def test_it_goes_on_after_a_stop(long):
    long.worker.stop()
    long.worker.wait(20)
    long.settings.num_inference_steps = 2
    assert len(made(long)) == 1


def test_stop_before_the_first_step(studio, monkeypatch):
    studio.engine.faceid, load = None, S.load
    def slow(name, **more):
        studio.worker.stop()
        return load(name, **more)
    monkeypatch.setattr(S, 'load', slow)
    studio.generate()
    assert studio.worker.wait(60) and studio.progress.status == 'stopped'
    assert studio.progress.step == 0 and studio.gallery.portraits == []


def test_controls_are_alive_while_it_works(long):
    slowest = 0
    for k in range(20):
        began = time.time()
        long.settings.scale = k/20
        slowest = max(slowest, time.time() - began)
        time.sleep(.01)
    assert slowest < .1 and long.worker.busy


def test_nothing_else_begins_while_it_works(long):
    long.settings.prompt = ''
    assert not long.generate() and not long.begin(print)
    assert not long.worker.error, 'a click is not heard, and nothing is wrong'


def test_a_generation_that_fails(studio, monkeypatch):
    made(studio)
    monkeypatch.setattr(studio.engine.faceid, 'generate', raising(RuntimeError('CUDA out of memory')))
    studio.generate()
    assert studio.worker.wait(20) and 'not enough memory' in studio.worker.error
    assert len(studio.gallery.portraits) == 1


def test_the_next_generation_does_not_know_of_a_failed_one(studio, monkeypatch):
    made(studio)
    with monkeypatch.context() as m:
        m.setattr(studio.engine.faceid, 'generate', raising(RuntimeError('wrong')))
        studio.generate()
        studio.worker.wait(20)
    assert len(made(studio)) == 2 and studio.worker.error == ''


def test_the_model_is_kept_until_another_is_asked_for(studio):
    made(studio)
    first = studio.engine.faceid
    made(studio)
    assert studio.engine.faceid is first


def test_the_model_changes(studio):
    made(studio)
    first, studio.settings.model = studio.engine.faceid, 'tiny-portrait'
    portraits = made(studio)
    assert studio.engine.faceid is not first and studio.engine.faceid.name == 'tiny-portrait'
    assert portraits[0].settings['model'] == 'tiny-portrait'


def test_a_studio_is_closed_before_it_has_done_anything():
    studio = Studio()
    assert studio.close() and studio.engine.faceid is None


def test_a_seed_that_is_not_locked_is_drawn(studio):
    studio.settings.seed_locked = False
    made(studio)
    first = studio.settings.seed
    made(studio)
    second = studio.settings.seed
    assert first != second
    assert [p.settings['seed'] for p in studio.gallery.portraits] == [second, first]


def test_a_long_prompt_is_noted(studio):
    studio.settings.prompt = 'photo of a person, ' + 'smiling, '*60
    made(studio)
    assert 'The prompt is long: the model reads its first' in studio.worker.note


def test_a_note_goes_away_with_the_next_generation(studio):
    studio.worker.note = 'old'
    made(studio)
    assert studio.worker.note == ''


def test_a_portrait_is_of_the_face_that_was_chosen_when_it_began(studio, two):
    studio.people.photographs = []
    photo = studio.entrance.add(two, 'two.png')
    def choose_another(change):
        if change.new: studio.people.choose(photo, 1)
    studio.progress.observe(choose_another, 'step')
    portrait = made(studio)[0]
    assert portrait.sitter.face is photo.faces[0] and '[0]' in portrait.python


# code, files

@pytest.mark.parametrize('model', ['tiny-faceid', 'tiny-portrait'])
@pytest.mark.parametrize('photographs', [1, 2])
def test_the_code_makes_the_same_picture(studio, photo, two, model, photographs, tmp_path, monkeypatch):
    studio.settings.take(dict(model=model, negative_prompt="it's \"quoted\"", scale=.8))
    (tmp_path/'me.png').write_bytes(photo)
    (tmp_path/'two.png').write_bytes(two)
    if photographs == 2: studio.people.choose(studio.entrance.add(two, 'two.png'), 1)
    portrait = made(studio)[0]
    monkeypatch.chdir(tmp_path)
    assert largest_difference(executed(portrait.python)['picture'], portrait.image) <= 2


def test_the_code_is_of_the_settings_that_made_it(studio):
    portrait = made(studio)[0]
    before = portrait.python
    studio.settings.scale = .1
    assert portrait.python == before and 'scale=1.0' in before


def test_the_code_is_of_the_photographs_that_were_read(studio):
    portrait = made(studio)[0]
    studio.people.photographs = []
    assert "read('me.png')[0]" in portrait.python


def test_a_path_is_its_own_code(studio, photo, tmp_path):
    (tmp_path/'x.png').write_bytes(photo)
    added = studio.entrance.add(tmp_path/'x.png')
    assert added.name == 'x.png' and repr(str(tmp_path/'x.png')) in added.python


@pytest.fixture
def saved(studio, tmp_path):
    studio.settings.take(dict(prompt='photo of a person, frowning', scale=.7, num_samples=2))
    return studio.gallery.save(made(studio)[1], tmp_path)


def test_saved_files_have_names_of_their_own(studio, tmp_path):
    portrait = made(studio)[0]
    a, b = studio.gallery.save(portrait, tmp_path), studio.gallery.save(portrait, tmp_path)
    assert a != b and a.is_file() and b.is_file()


@pytest.mark.parametrize('form', [lambda path: path, lambda path: path.read_bytes()])
def test_a_saved_portrait_restores_its_settings(saved, form):
    other = Studio()
    assert S.restore(other, form(saved)) and other.worker.error == ''
    names = 'model', 'prompt', 'scale', 'num_inference_steps', 'seed', 'num_samples'
    expected = 'tiny-faceid', 'photo of a person, frowning', .7, 2, 1, 1
    assert tuple(getattr(other.settings, name) for name in names) == expected


def test_what_carries_no_settings_restores_none(photo, tmp_path):
    other = Studio()
    before = other.settings.asked()
    for bad in (photo, b'x', tmp_path/'none.png'):
        assert not S.restore(other, bad) and other.worker.error and other.settings.asked() == before


@pytest.mark.parametrize('wrong', [dict(scale=99.), dict(model='x'), dict(prompt=3)])
def test_what_a_file_says_is_checked(studio, tmp_path, wrong):
    portrait, other = made(studio)[0], Studio(scale=.3)
    portrait.settings |= wrong
    assert not S.restore(other, studio.gallery.save(portrait, tmp_path)) and other.worker.error
    assert other.settings.scale == .3 and other.settings.model == 'tiny-plusv2'


def test_a_file_cannot_allow_a_download(studio, tmp_path):
    portrait, other = made(studio)[0], Studio()
    portrait.settings |= dict(download=True)
    assert S.restore(other, studio.gallery.save(portrait, tmp_path)) and not other.engine.download


def test_a_dropped_photograph_is_added(studio, photo):
    studio.people.photographs = []
    S.receive(studio, 'a.png', photo)
    assert [p.name for p in studio.people.photographs] == ['a.png'] and not studio.worker.error


def test_a_dropped_portrait_restores_its_settings(studio, saved):
    studio.settings.prompt = 'other'
    S.receive(studio, 'b.png', saved.read_bytes())
    assert studio.settings.prompt == 'photo of a person, frowning'
    assert len(studio.people.photographs) == 1
    assert 'b.png: settings restored' in studio.worker.note
    assert 'Add the photograph' not in studio.worker.note


def test_a_dropped_portrait_asks_for_the_photograph(saved):
    other = Studio()
    S.receive(other, 'b.png', saved.read_bytes())
    assert 'Add the photograph' in other.worker.note


def test_another_dropped_file_is_refused():
    other = Studio(model='tiny-faceid')
    S.receive(other, 'c.txt', b'hello')
    assert 'not a picture' in other.worker.error and other.people.photographs == []


# people

def test_several_photographs_are_of_one_person(studio, two):
    studio.entrance.add(two, 'two.png')
    assert [[p.name for p in group] for group in studio.people.groups] == [['me.png', 'two.png']]


def test_several_people_get_pictures_of_their_own(studio, two):
    second = studio.entrance.add(two, 'two.png')
    studio.people.choose(second, 1)
    studio.people.side_by_side, studio.settings.num_samples = True, 2
    portraits = made(studio)
    assert [p.sitter.name for p in portraits] == ['me.png']*2 + ['two.png']*2
    assert [p.settings['seed'] for p in portraits] == [0, 1]*2
    codes = ["model.reader.read('me.png')[0]", "model.reader.read('two.png')[1]"]
    assert [p.sitter.python for p in portraits[1:3]] == codes
    assert portraits[2].sitter.face is second.face


def test_everybody_is_measured_against_his_own_photograph(studio, two):
    studio.people.choose(studio.entrance.add(two, 'two.png'), 1)
    studio.people.side_by_side = True
    for p in made(studio): assert abs(p.likeness - identity_similarity(p.sitter.face, p.image)[0]) < 1e-5


@pytest.fixture
def stranger(two):
    "The face at the right of a picture of two, alone."
    return png(two_faces().crop((170, 0, 320, 160)))


def test_two_photographs_of_one_person_are_not_pointed_out(studio, photo):
    studio.entrance.add(photo, 'again.png')
    assert studio.worker.note == ''


def test_two_people_in_one_are_pointed_out(studio, stranger):
    other = studio.entrance.add(stranger, 'b.png')
    assert float(other.face.embedding @ studio.people.photographs[0].face.embedding) < .2
    assert 'me.png and b.png look like two people' in studio.worker.note


def test_two_people_side_by_side_are_not_pointed_out(studio, stranger):
    studio.people.side_by_side = True
    studio.entrance.add(stranger, 'b.png')
    assert studio.worker.note == ''


@pytest.mark.parametrize('model, wanted, read', [
    ('tiny-faceid', 2, 3), ('tiny-portrait', 2, 2), ('tiny-portrait', 0, 3)])
def test_portrait_reads_as_many_photographs_as_are_wanted(studio, photo, model, wanted, read):
    for name in ('b.png', 'c.png'): studio.entrance.add(photo, name)
    studio.settings.model, studio.people.num_photographs = model, wanted
    assert [len(group) for group in studio.people.groups] == [read]


def test_a_portrait_names_the_photographs_that_were_read(studio, photo):
    for name in ('b.png', 'c.png'): studio.entrance.add(photo, name)
    studio.settings.model, studio.people.num_photographs = 'tiny-portrait', 2
    assert made(studio)[0].sitter.name == 'me.png, b.png'


def test_a_drawn_person_is_another_one_each_time(studio):
    studio.people.photographs = []
    a = studio.entrance.draw_person()
    assert not studio.people.side_by_side
    b = studio.entrance.draw_person()
    assert studio.people.side_by_side and a.name != b.name
    assert float(a.face.embedding @ b.face.embedding) < .3


def test_a_drawn_person_has_code(studio):
    studio.people.photographs = []
    studio.entrance.draw_person()
    portrait = made(studio)[0]
    assert largest_difference(executed(portrait.python)['picture'], portrait.image) <= 2


def test_a_photograph_is_read_again_by_another_pack(studio):
    photo = studio.people.photographs[0]
    right = photo.face.embedding
    photo.faces, photo.chosen = [replace(photo.faces[0], pack='other', embedding=-right)]*3, 2
    made(studio)
    assert photo.chosen == 0 and len(photo.faces) == 1
    assert photo.face.pack == 'tiny' and float(photo.face.embedding @ right) > .99


def test_a_photograph_that_cannot_be_read_again_is_said(studio):
    photo = studio.people.photographs[0]
    photo.faces = [replace(photo.faces[0], pack='other')]
    photo.source = png(Image.new('RGB', (64, 64)))
    studio.generate()
    assert studio.worker.wait(20) and "No face was found in 'me.png'" in studio.worker.error
    assert studio.progress.status == 'failed'


@pytest.fixture
def packless(studio, monkeypatch):
    "A studio whose model needs a face pack that is not here, and the packs that it downloads."
    from faceid_nb import face
    tiny, came = studio.engine.reader('tiny'), []
    missing = S.PackMissingError('The face pack is missing')
    monkeypatch.setattr(face.FaceReader, '__init__', raising(missing))
    def download(pack):
        came.append(pack)
        studio.engine.readers[pack] = tiny
    monkeypatch.setattr(S, 'download_pack', download)
    studio.settings.model, studio.engine.readers = 'sd15-faceid', dict(tiny=tiny)
    yield studio, came
    studio.engine.readers = {}


def test_a_face_pack_is_not_fetched_unless_that_is_allowed(packless, photo):
    studio, came = packless
    assert studio.entrance.add(photo, 'b.png') is None
    assert 'Or allow the download' in studio.worker.error
    assert not came and len(studio.people.photographs) == 1


def test_a_face_pack_is_fetched_for_a_photograph_if_that_is_allowed(packless, photo):
    studio, came = packless
    studio.engine.download = True
    studio.entrance.add(photo, 'b.png')
    finish(studio, 20)
    assert came == ['buffalo_l'] and [p.name for p in studio.people.photographs] == ['me.png', 'b.png']
    assert 'b.png is read as soon as' in studio.worker.note


def test_a_face_pack_that_does_not_come_is_said(packless, photo, monkeypatch):
    studio, _ = packless
    monkeypatch.setattr(S, 'download_pack', lambda pack: None)
    studio.engine.download = True
    studio.entrance.add(photo, 'c.png')
    assert studio.worker.wait(20) and 'is missing' in studio.worker.error
    assert len(studio.people.photographs) == 1


# the gallery

@pytest.fixture
def three(studio):
    "A gallery of three portraits: likeness .3, nan, .6."
    measured = (0, .3), (1, math.nan), (2, .6)
    studio.gallery.portraits = [Portrait(None, dict(model='m', seed=s, scale=1.), l, .1) for s, l in measured]
    return studio.gallery


def test_the_order_of_the_gallery(three):
    a, b, c = three.portraits
    assert three.shown == [a, b, c]
    three.best_first = True
    assert three.shown == [c, a, b]


def test_keeping_is_told(three):
    heard = []
    three.observe(lambda change: heard.append(1), 'portraits')
    three.keep(three.portraits[1])
    assert heard == [1] and three.portraits[1].kept


def test_a_portrait_is_compared_once(three):
    a, b, _ = three.portraits
    for portrait in (a, b, b): three.compare(portrait)
    assert three.compared == [a, b]


def test_a_portrait_is_put_away(three):
    three.compare(three.portraits[0])
    three.compare(three.portraits[0], False)
    assert three.compared == []


def test_differences_are_measurements_and_unequal_settings(three):
    nan = pytest.approx(math.nan, nan_ok=True)
    expected = dict(likeness=[.3, nan], distance=[.1, .1], seed=[0, 1])
    assert S.differences(three.portraits[:2]) == expected


def test_what_is_not_kept_is_cleared(three):
    a, b, _ = three.portraits
    three.keep(b)
    for portrait in (a, b): three.compare(portrait)
    three.clear()
    assert three.portraits == [b] and three.compared == [b]


def test_only_so_many_are_remembered_but_all_that_are_kept(studio):
    gallery, old = studio.gallery, [Portrait(None, dict(seed=i), .1, .1) for i in range(6)]
    gallery.most, gallery.portraits = 3, old
    gallery.keep(old[5])
    new = Portrait(None, dict(seed=7))
    gallery.remember([new])
    assert gallery.portraits == [new, *old[:3], old[5]]


def test_all_are_saved_if_that_is_wanted(studio, tmp_path):
    studio.gallery.folder, studio.gallery.save_all = str(tmp_path/'new'), True
    studio.settings.num_samples = 2
    made(studio)
    assert len(list((tmp_path/'new').glob('*.png'))) == 2


def test_pictures_that_cannot_be_measured_are_kept(studio, monkeypatch):
    monkeypatch.setattr(S, 'measure_pictures', raising(RuntimeError('no measure')))
    portraits = made(studio)
    assert len(portraits) == 1 and math.isnan(portraits[0].likeness)
    assert 'no measure' in studio.worker.error and studio.progress.status == 'failed'


def test_pictures_that_cannot_be_saved_are_kept(studio, monkeypatch):
    studio.gallery.save_all = True
    monkeypatch.setattr(studio.gallery, 'save', raising(OSError('disk full')))
    assert len(made(studio)) == 1 and 'disk full' in studio.worker.error


def test_a_flattering_likeness_is_noted(studio, monkeypatch):
    from faceid_nb.measure import Judge
    find = Judge.find
    monkeypatch.setattr(S.Judge, 'find', lambda reader, needed: find(False, reader))
    made(studio)
    assert 'which flatters' in studio.worker.note


# the machine

def test_device_memory_and_provider_are_told(studio):
    made(studio)
    machine = studio.machine
    used, _, there, unit = machine.memory.split()
    assert machine.provider == 'CPUExecutionProvider'
    assert unit == 'GB' and 0 < float(used) < float(there)
    assert machine.device.startswith(str(studio.engine.faceid.pipe.device))
    assert 'cpu' in machine.device or 'cuda' in machine.device


def test_a_pack_that_is_not_here_is_told():
    machine = Studio(model='sd15-faceid').machine
    machine.inspect()
    assert 'buffalo_l is not on this machine' in machine.provider or machine.provider.endswith('Provider')


def test_memory_is_not_released_under_work(long):
    assert long.release() is False and long.engine.faceid is not None


def test_memory_is_released(studio):
    made(studio)
    assert studio.release()
    assert studio.engine.faceid is None and studio.engine.readers == {} and studio.engine.previewer is None


def test_what_was_released_is_loaded_again(studio):
    made(studio)
    studio.release()
    assert len(made(studio)) == 2


def test_a_preview_that_cannot_be_made_costs_nothing_else(studio, monkeypatch):
    studio.engine.previewer, studio.progress.preview_every = None, 1
    monkeypatch.setattr(S, 'find_previewer', raising(RuntimeError('CUDA out of memory')))
    assert len(made(studio)) == 1 and studio.worker.error == '' and studio.progress.preview == []
    studio.engine.previewer = None


def test_a_model_that_cannot_be_loaded_is_said(studio, monkeypatch):
    monkeypatch.setattr(S, 'load', raising(ArgumentError('Broken', 'by the test', 'Mend it')))
    studio.release()
    studio.generate()
    assert studio.worker.wait(20) and studio.worker.error == 'Broken. by the test. Mend it.'
    assert studio.progress.status == 'failed' and not studio.worker.busy


# what a model needs

def test_the_tiny_pack_is_always_here():
    assert S.parts_needed('tiny-plusv2') == []
    assert S.describe_model('tiny-plusv2').startswith('on this machine. Licence: Apache')


def test_what_is_not_here_is_listed_with_its_size(tmp_path):
    parts = S.parts_needed('sd15-plusv2', tmp_path)
    assert [p.what for p in parts] == ['base model', 'FaceID', 'VAE', 'encoder', 'face pack']
    assert not any(p.here for p in parts)
    said = S.describe_model('sd15-plusv2', tmp_path)
    assert 'download of 4.7 GB or more' in said and 'non-commercial' in said


def test_a_separate_lora_is_a_part(tmp_path):
    assert 'LoRA' in [p.what for p in S.parts_needed('sd15-faceid-lora', tmp_path)]


@pytest.mark.parametrize('megabytes, said', [(999, '999 MB'), (1000, '1.0 GB')])
def test_sizes_are_said(megabytes, said): assert S.size_of(megabytes) == said


def test_what_is_in_the_cache_is_here(tmp_path):
    repo = tmp_path/'models--h94--IP-Adapter-FaceID'
    for folder in (repo/'snapshots'/'a', repo/'refs'): folder.mkdir(parents=True)
    (repo/'refs'/'main').write_text('a')
    (repo/'snapshots'/'a'/'ip-adapter-faceid-plusv2_sd15.bin').write_text('x')
    assert [p.what for p in S.parts_needed('sd15-plusv2', tmp_path) if p.here] == ['FaceID']
    assert 'download of 4.5 GB' in S.describe_model('sd15-plusv2', tmp_path)


@pytest.fixture
def asked(studio, monkeypatch):
    "What was loaded, of a model that is not here."
    asked = []
    def load(name, **more):
        asked.append((name, more))
        raise ArgumentError('not here', '', '')
    monkeypatch.setattr(S, 'load', load)
    studio.settings.model = 'sd15-faceid'
    return asked


def test_nothing_is_fetched_that_was_not_allowed(studio, asked):
    assert not studio.generate() and not asked
    assert '2.7 GB or more would be downloaded. Allow the download' in studio.worker.error


def test_what_is_allowed_is_fetched(studio, asked):
    studio.engine.download = True
    assert studio.generate() and studio.worker.wait(20)
    assert asked == [('sd15-faceid', dict(download=True))] and 'not here' in studio.worker.error
