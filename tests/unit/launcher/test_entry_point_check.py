from launcher.entry_point_check import stock_deepspeed_notice


def test_our_command_needs_no_notice(tmp_path):
    (tmp_path / "deepspeed").write_text("#!/usr/bin/python\nfrom launcher.deepspeed_cli import main\nmain()\n")
    assert stock_deepspeed_notice(tmp_path) is None


def test_no_command_needs_no_notice(tmp_path):
    assert stock_deepspeed_notice(tmp_path) is None


def test_the_stock_command_is_explained_in_one_line(tmp_path):
    (tmp_path / "deepspeed").write_text("#!/usr/bin/python\nfrom deepspeed.launcher.runner import main\nmain()\n")
    notice = stock_deepspeed_notice(tmp_path)
    assert notice is not None
    assert "\n" not in notice
    assert "--module" in notice
    assert str(tmp_path / "deepspeed") in notice
