"The reader of structure that a training listens to."
import torch
from faceid_nb.tiny import lessons as L
from faceid_nb.tiny.scenes import correlation
from faceid_nb.train_data import LatentTable


def test_a_structure_reader_reads_latents():
    "Pose that lies in the latents is read there, on people held out; rows without latents are left alone."
    g = torch.Generator().manual_seed(0)
    n = 400
    scores = torch.randn(2*n, 2, generator=g)
    z = torch.randn(n, 8, 16, 16, generator=g)*.3
    z[:, :2] += scores[::2, :, None, None]
    table = LatentTable(z, torch.zeros(1, n, 5), torch.randn(2*n, 512, generator=g),
                        torch.arange(n).repeat_interleave(2), rows=torch.arange(0, 2*n, 2), scores=scores,
                        held=100)
    *_, last = L.train_structure_reader(table, steps=60, batch=32, log_every=30)
    assert last['clear'] > .8
    assert last['vague'] > .6
    assert not any(p.requires_grad for p in last['reader'].parameters())
    assert last['reader_step'] == 60
    assert correlation(last['reader'](z)[:, 0].detach(), scores[::2, 0])[0] > .8
    assert not torch.equal(L.vague(z, g), z)
