//! All counters of this process as one table: what [`super::metrics`] records, and what the operating system does.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use super::{metrics, process};

/// What one process has counted since it began.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Counters {
    /// Drawn when the process began: nodes that share a process have the same.
    pub process: u64,
    /// By name, with labels as on the page: `pontoon_raft_messages_total{kind="append"}`.
    pub values: BTreeMap<String, f64>,
}

impl Counters {
    /// The counters of this process. Reads files of `/proc`: not for a thread that mustn't block.
    pub fn read() -> Counters {
        let mut values = process::counters();
        // Without a recorder there is nothing to tell, and whoever starts a node is told so then.
        if let Ok(page) = metrics::install() {
            values.extend(parse(&page.render()));
        }
        Counters { process: this_process(), values }
    }

    /// The counter of this name; with no label in the name, the sum over its labels.
    pub fn get(&self, name: &str) -> Option<f64> {
        if let Some(value) = self.values.get(name) {
            return Some(*value);
        }
        let of_labels = self.labelled(name);
        (!of_labels.is_empty()).then(|| of_labels.values().sum())
    }

    /// The counters of this name by what its one label says.
    pub fn labelled(&self, name: &str) -> BTreeMap<String, f64> {
        let label = |series: &str| {
            let labels = series.strip_prefix(name)?.strip_prefix('{')?.strip_suffix('}')?;
            Some(labels.split_once('=')?.1.trim_matches('"').to_owned())
        };
        self.values.iter().filter_map(|(series, value)| Some((label(series)?, *value))).collect()
    }

    /// What was counted since `before`, of the same process.
    pub fn since(&self, before: &Counters) -> Counters {
        let then = |name: &String| before.values.get(name).copied().unwrap_or(0.0);
        // A thread that ends takes its own time with it: so a sum may be less than before.
        let rise = |(name, value): (&String, &f64)| (name.clone(), (value - then(name)).max(0.0));
        Counters { process: self.process, values: self.values.iter().map(rise).collect() }
    }
}

fn this_process() -> u64 {
    static PROCESS: OnceLock<u64> = OnceLock::new();
    *PROCESS.get_or_init(rand::random)
}

/// Series and values of a page in Prometheus's text format, without the buckets of histograms.
fn parse(page: &str) -> impl Iterator<Item = (String, f64)> {
    page.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let name = series.split('{').next()?;
        (!name.ends_with("_bucket")).then_some((series.to_owned(), value.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(values: &[(&str, f64)]) -> Counters {
        let values = values.iter().map(|(name, value)| ((*name).to_owned(), *value));
        Counters { process: 1, values: values.collect() }
    }

    #[test]
    fn a_page_is_read_without_its_buckets() {
        let page =
            "# HELP a A.\n# TYPE a counter\na 3\n\nb{kind=\"x y\"} 4\nc_bucket{le=\"0.1\"} 5\nc_sum 0.5\n";
        let expected = [("a", 3.0), ("b{kind=\"x y\"}", 4.0), ("c_sum", 0.5)];
        assert_eq!(parse(page).collect::<BTreeMap<_, _>>(), counters(&expected).values);
    }

    #[test]
    fn labels_are_told_apart_and_summed() {
        let all = counters(&[("m{kind=\"a\"}", 3.0), ("m{kind=\"b\"}", 4.0), ("mm", 9.0), ("n", 1.0)]);
        assert_eq!((all.get("m"), all.get("n"), all.get("m{kind=\"a\"}")), (Some(7.0), Some(1.0), Some(3.0)));
        assert_eq!(all.get("x"), None);
        assert_eq!(all.labelled("m"), BTreeMap::from([("a".to_owned(), 3.0), ("b".to_owned(), 4.0)]));
        // A name that has both: the whole, not the whole and its parts.
        let both = counters(&[("cpu", 10.0), ("cpu{thread=\"a\"}", 6.0), ("cpu{thread=\"b\"}", 4.0)]);
        assert_eq!(both.get("cpu"), Some(10.0));
    }

    #[test]
    fn what_has_risen_and_what_is_new() {
        let before = counters(&[("a", 3.0), ("gone", 4.0), ("less", 9.0)]);
        let after = counters(&[("a", 5.0), ("new", 2.0), ("less", 8.0)]);
        assert_eq!(after.since(&before), counters(&[("a", 2.0), ("new", 2.0), ("less", 0.0)]));
    }

    #[test]
    fn this_process_tells_both_kinds() {
        let first = Counters::read();
        assert!(first.get(metrics::READIES).is_some(), "{first:?}");
        assert_eq!(first.process, Counters::read().process);
        #[cfg(target_os = "linux")]
        assert!(first.get(process::CPU_US).is_some());
    }
}
