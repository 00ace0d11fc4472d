//! Searches scenarios: `search [SCENARIO|all] [FIRST] [LAST] [TICKS] [MUTATION] [quiet]`.

use std::time::Instant;

use heca_sim::{Scenario, Search, search};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default| {
        arguments.get(i).and_then(|a: &String| a.parse().ok()).unwrap_or(default)
    };
    let name = arguments.first().map_or("all", String::as_str);
    let mutation = arguments.get(4).and_then(|m| serde_json::from_value(m.as_str().into()).ok());
    for scenario in Scenario::ALL.into_iter().filter(|s| name == "all" || s.name() == name) {
        let begin = Instant::now();
        let options = Search {
            scenario,
            seeds: number(1, 1)..=number(2, 100),
            ticks_per_seed: number(3, 4000),
            mutation,
        };
        match search(&options) {
            Ok(report) if arguments.len() > 5 => {
                let missed: Vec<&str> = scenario
                    .expected()
                    .iter()
                    .filter(|n| report.branches.iter().any(|b| b.name == **n && b.count == 0))
                    .copied()
                    .collect();
                println!(
                    "{scenario}: {} worlds, {} ticks, {:?}, missed {missed:?}",
                    report.worlds,
                    report.ticks,
                    begin.elapsed()
                );
            }
            Ok(report) => println!("{scenario} in {:?}\n{report}", begin.elapsed()),
            Err(violation) => println!("{violation}\n"),
        }
    }
}
