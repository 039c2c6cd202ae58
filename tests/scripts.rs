//! Golden scripts: readable tests of the pure parts, one directory per area under tests/scripts. See
//! tests/support/script.rs for the form of a script and how to rewrite its output.

#[path = "support/script.rs"]
mod script;

// Each area has the interpreter of its commands beside its scripts. To add one: a
// directory, its interpreter as a module here, and a test below.
#[path = "scripts/balance/interpreter.rs"]
mod balance;
#[path = "scripts/group/interpreter.rs"]
mod group;
#[path = "scripts/machine/interpreter.rs"]
mod machine;
#[path = "scripts/placement/interpreter.rs"]
mod placement;

#[test]
fn balance_scripts() {
    script::run_area("balance", balance::Balance::default);
}

#[test]
fn group_scripts() {
    script::run_area("group", group::Groups::default);
}

#[test]
fn machine_scripts() {
    script::run_area("machine", machine::Machines::default);
}

#[test]
fn placement_scripts() {
    script::run_area("placement", placement::Placement::default);
}
