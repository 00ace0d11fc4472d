//! Guest RAM: it has to be a shared mapping of a tmpfs file that fills only when touched.

use super::Finding;
use super::options::Properties;

const USE_FILE: &str = "use -object memory-backend-file,id=pc.ram,size=...,mem-path=/dev/shm/...,\
     share=on with -machine memory-backend=pc.ram (libvirt: <memoryBacking><source type='file'/>\
     <access mode='shared'/></memoryBacking>)";

pub(super) fn screen(options: &[(&str, Properties)]) -> Vec<Finding> {
    let backends: Vec<&Properties> = options
        .iter()
        .filter(|(name, value)| *name == "object" && kind(value).starts_with("memory-backend-"))
        .map(|(_, value)| value)
        .collect();
    let ram = ram_ids(options);
    let mut findings = Vec::new();
    if ram.is_empty() {
        findings.push(no_backend(options, &backends));
    }
    for &id in &ram {
        if !backends.iter().any(|backend| backend.get("id") == Some(id)) {
            findings.push(Finding::refuse(
                format!("memory-backend={id}"),
                "no -object on the command line has this id, so how RAM is mapped is unknown",
                USE_FILE,
            ));
        }
    }
    for backend in backends {
        let is_ram = backend.get("id").is_some_and(|id| ram.contains(&id));
        findings.extend(mapping(backend, is_ram));
        findings.extend(filling(backend));
    }
    findings.extend(options.iter().filter_map(|(name, value)| whole_machine(name, value)));
    findings
}

/// The ids of the backends that are the machine's own RAM.
fn ram_ids<'a>(options: &'a [(&str, Properties)]) -> Vec<&'a str> {
    let machine = options
        .iter()
        .rev()
        .filter(|(name, _)| matches!(*name, "machine" | "M"))
        .find_map(|(_, value)| value.get("memory-backend"));
    let nodes = options.iter().filter(|(name, _)| *name == "numa");
    machine.into_iter().chain(nodes.filter_map(|(_, value)| value.get("memdev"))).collect()
}

fn no_backend(options: &[(&str, Properties)], backends: &[&Properties]) -> Finding {
    let fix = USE_FILE;
    if options.iter().any(|(name, _)| *name == "mem-path") {
        return Finding::refuse("-mem-path", "it maps guest RAM privately", fix);
    }
    if let Some(backend) = backends.first() {
        return Finding::refuse(
            format!("-object {}", kind(backend)),
            "neither -machine memory-backend= nor -numa memdev= makes it guest RAM",
            fix,
        );
    }
    let why = "guest RAM is private memory of qemu: its pages cannot be taken out or put back";
    Finding::refuse("guest RAM without a memory-backend-file", why, fix)
}

fn mapping(backend: &Properties, is_ram: bool) -> Option<Finding> {
    let kind = kind(backend);
    let what = format!("-object {kind},id={}", backend.get("id").unwrap_or("?"));
    // QEMU shares memfd and shm unless told otherwise, files only if told so.
    let shared = match kind {
        "memory-backend-file" => backend.is_on("share"),
        "memory-backend-memfd" | "memory-backend-shm" => {
            backend.get("share").is_none() || backend.is_on("share")
        }
        _ => false,
    };
    match (shared, is_ram) {
        (true, _) if kind == "memory-backend-file" => None,
        (true, _) => Some(Finding::warning(
            what,
            "paging works, but qemu 8.1 and later send such RAM through the migration stream",
            "for live migration use memory-backend-file on tmpfs",
        )),
        (false, true) => Some(Finding::refuse(
            what,
            "guest RAM is not a shared file mapping: its pages cannot be taken out or put back",
            USE_FILE,
        )),
        (false, false) => Some(Finding::warning(
            what,
            "this part of guest memory is private to qemu and stays local",
            "make it a memory-backend-file with share=on to page it as well",
        )),
    }
}

fn filling(backend: &Properties) -> Vec<Finding> {
    let mut findings = Vec::new();
    let what = |key: &str| format!("-object {},{key}", kind(backend));
    if backend.is_on("prealloc") {
        findings.push(prealloc(what("prealloc=on")));
    }
    let path = backend.get("mem-path").unwrap_or_default();
    let huge = ["hugepages", "hugetlbfs"];
    if backend.is_on("hugetlb") || path.split('/').any(|p| huge.iter().any(|h| p.starts_with(h))) {
        findings.push(Finding::refuse(
            what(if path.is_empty() { "hugetlb=on" } else { path }),
            "pages of hugetlbfs are 2 MiB or more and cannot be paged one by one",
            "put the RAM file on tmpfs, such as /dev/shm (libvirt: remove <hugepages/>)",
        ));
    }
    if backend.is_on("discard-data") {
        findings.push(Finding::warning(
            what("discard-data=on"),
            "qemu empties the RAM file when it exits, which destroys a guest that has migrated",
            "leave it out before migrating (libvirt: remove <discard/>)",
        ));
    }
    findings
}

/// Options that concern all of guest RAM.
fn whole_machine(name: &str, value: &Properties) -> Option<Finding> {
    let locked = |what: String| {
        let why = "locked pages cannot be taken out";
        Finding::refuse(what, why, "leave it out (libvirt: remove <locked/>)")
    };
    match name {
        "mem-prealloc" => Some(prealloc("-mem-prealloc".to_owned())),
        // QEMU 10 also has on-fault, which locks each page when it comes.
        "overcommit" => {
            let lock = value.get("mem-lock").filter(|lock| !is_off(lock))?;
            Some(locked(format!("-overcommit mem-lock={lock}")))
        }
        "realtime" if value.is_on("mlock") => Some(locked("-realtime mlock=on".to_owned())),
        "machine" | "M" => {
            let keys = ["confidential-guest-support", "memory-encryption"];
            let key = keys.into_iter().find(|key| value.get(key).is_some())?;
            Some(Finding::refuse(
                format!("-machine {key}"),
                "the memory of confidential guests is pinned and cannot be read by the host",
                "run this machine without remote memory",
            ))
        }
        "set" | "readconfig" => Some(Finding::warning(
            format!("-{name}"),
            "it changes options in a way that this check cannot see",
            "write the options on the command line",
        )),
        _ => None,
    }
}

fn prealloc(what: String) -> Finding {
    let why = "it fills all guest memory at the start, more than this host may have";
    Finding::refuse(what, why, "use prealloc=off (libvirt: remove <allocation mode='immediate'/>)")
}

fn is_off(value: &str) -> bool {
    matches!(value, "off" | "no" | "false" | "n")
}

fn kind(object: &Properties) -> &str {
    object.get("qom-type").unwrap_or_default()
}
