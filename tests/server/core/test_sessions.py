from .rig import Rig, facts, to_keys
def test_x():
    rig = Rig()
    e = rig.engine()
    assert set(e.store(range(5))) == {1}
    assert e.hits(range(8)) == [0,1,2,3,4]
    assert all(e.load(range(5)))
    rig.check()
    e.die(); rig.tick(); rig.assert_nothing_is_held()
