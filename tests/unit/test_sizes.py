"What is said about the size of a download follows from the shapes of the networks."
import networks as N
import pytest

from faceid_nb.studio import MILLIONS


@pytest.mark.parametrize('name, parts', [
    ('sd', ('sd', 'vae', 'text')),
    ('sdxl', ('sdxl', 'vae', 'text', 'large_text')),
    ('vae', ('vae',)),
    ('encoder', ('eye', 'words')),
])
def test_base_models(name, parts):
    assert MILLIONS[name] == round(N.count(*(N.networks()[part] for part in parts)))


@pytest.mark.parametrize('kind', ['sd', 'sdxl'])
def test_faceid(kind):
    expected = N.identity_layers(kind) + N.lora_layers(kind) + N.projection(kind, 4)
    assert MILLIONS[kind, 'faceid'] == round(expected)


@pytest.mark.parametrize('kind', ['sd', 'sdxl'])
def test_portrait(kind):
    assert MILLIONS[kind, 'portrait'] == round(N.identity_layers(kind) + N.projection(kind, 16))


@pytest.mark.parametrize('kind', ['sd', 'sdxl'])
def test_plusv2(kind):
    expected = N.identity_layers(kind) + N.lora_layers(kind) + N.plus_projection(kind)
    assert MILLIONS[kind, 'plusv2'] == round(expected)


def test_a_separate_lora(): assert MILLIONS['lora'] == round(N.lora_layers('sd'))
