//! Which kinds of faults a simulation has. When they strike, and whom: `strikes`.

use super::dice::Dice;

macro_rules! faults {
    ($($(#[$doc:meta])* $field:ident = $name:literal,)*) => {
        /// Which kinds of faults happen.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub struct Faults {
            $($(#[$doc])* pub $field: bool,)*
        }

        impl Faults {
            /// None.
            pub const NONE: Faults = Faults { $($field: false,)* };

            /// All.
            pub const ALL: Faults = Faults { $($field: true,)* };

            /// Their names, in the order of the fields.
            pub const NAMES: &'static [&'static str] = &[$($name,)*];

            fn switch(&mut self, name: &str) -> Option<&mut bool> {
                match name {
                    $($name => Some(&mut self.$field),)*
                    _ => None,
                }
            }

            /// Each with an even chance.
            pub(super) fn some(dice: &mut Dice) -> Faults {
                Faults { $($field: dice.chance(500),)* }
            }
        }
    };
}

faults! {
    /// Messages are lost, doubled, late and out of order; what clients send is late.
    messages = "messages",
    /// Frames arrive with wrong bits, are dropped for their checksum, and their connection with them.
    corruption = "corruption",
    /// Links carry nothing for a while, in both directions or in one, and the sender notices now and then.
    partitions = "partitions",
    /// A connection is dead in one direction, and its sender doesn't notice.
    half_open = "half-open",
    /// All links of one node go away and come back, again and again.
    flapping = "flapping",
    /// Processes end and start again.
    crashes = "crashes",
    /// Crashes take unsynced writes with them.
    power = "power",
    /// Crashes tear the log write under way.
    torn = "torn",
    /// Reads of the log and of the engine fail for a while.
    eio = "eio",
    /// A record on disk rots: in the log, and its replica can't be opened any more; or in the state, which
    /// then is lost. Never of so many replicas of a shard that the others are no majority.
    rot = "rot",
    /// Processes stand still for a while.
    pauses = "pauses",
    /// Leadership is handed over.
    transfers = "transfers",
    /// Disks are slow for a while.
    slow_disks = "slow-disks",
    /// Replicas stop applying for a while, for want of memory.
    memory = "memory",
    /// Single replicas end and are opened again.
    replicas = "replicas",
    /// Replicas begin elections without a reason.
    campaigns = "campaigns",
    /// Time passes at different speeds.
    drift = "drift",
    /// A node that starts finds its state store gone, or an older copy of it. Never of so many replicas of a
    /// shard that those with a state are no majority.
    state_loss = "state-loss",
    /// Single replicas end in the middle of a pass: some of what it asks for has left, the rest never does.
    boundaries = "boundaries",
    /// Members of shards change: replicas come and go, by changes that are sensible and by others that aren't.
    membership = "membership",
    /// Nodes join the cluster.
    newcomers = "newcomers",
    /// A node is gone for good, with its disk. Never one without which a shard would have no majority, of one
    /// configuration or the other.
    node_loss = "node-loss",
    /// The metadata shard is part of the cluster, and its leader's node moves replicas as the map wants it: nodes are
    /// taken in, emptied, given up and removed, numbers of replicas change, load is spread anew. The changes
    /// of [`Faults::membership`] are not made then.
    rebalancing = "rebalancing",
    /// The port of a node refuses connections, and those that it had end, while its process lives: others take it for gone.
    refusals = "refusals",
}

impl Faults {
    /// Reads a list of names separated by commas; `all` and `none` are lists too. The error is the name
    /// that is none.
    pub fn parse(list: &str) -> Result<Faults, String> {
        let mut faults = Faults::NONE;
        for name in list.split(',').map(str::trim) {
            match (name, faults.switch(name)) {
                (_, Some(on)) => *on = true,
                ("all", _) => faults = Faults::ALL,
                ("none" | "", _) => {}
                _ => return Err(name.to_owned()),
            }
        }
        Ok(faults)
    }

    /// The names of those that are on, separated by commas.
    pub fn names(mut self) -> String {
        let on = Faults::NAMES.iter().filter(|name| self.switch(name).is_some_and(|on| *on));
        let on: Vec<&str> = on.copied().collect();
        if on.is_empty() { "none".into() } else { on.join(",") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_names_are_read_back() {
        for faults in [Faults::NONE, Faults::ALL, Faults { power: true, slow_disks: true, ..Faults::NONE }] {
            assert_eq!(Faults::parse(&faults.names()), Ok(faults));
        }
        assert_eq!(Faults::parse("all"), Ok(Faults::ALL));
        assert_eq!(Faults::NAMES.join(","), Faults::ALL.names());
        assert_eq!(Faults::parse("crashes,floods"), Err("floods".into()));
    }
}
