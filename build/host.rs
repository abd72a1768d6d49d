//! The kernels for the host: the same files, compiled by the C++ compiler against `cuda/host/platform.h`.

use crate::files;

pub fn build() -> Result<(), String> {
    println!("cargo::rerun-if-changed=cuda");
    println!("cargo::rerun-if-env-changed=CLA_SANITIZE");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).define("CLA_HOST", None).warnings(false);
    // Before the files: to a C++ compiler a .cu file is an unknown thing.
    build.flag("-x").flag("c++");
    if std::env::var("CLA_SANITIZE").is_ok_and(|x| x == "1") {
        build.flag("-fsanitize=address").flag("-fno-omit-frame-pointer").flag("-g");
        // x86 loads and stores at any address, a GPU only at a multiple of the size.
        build.flag("-fsanitize=alignment").flag("-fsanitize-undefined-trap-on-error");
        // Rust links with -nodefaultlibs, which keeps the compiler from adding its runtime by itself.
        println!("cargo::rustc-link-arg=-Wl,--push-state,--no-as-needed,-lasan,--pop-state");
    }
    build.files(files("cuda", &["cu"])?).file("cuda/host/runtime.cpp");
    build.try_compile("cla_host").map_err(|e| format!("the kernels do not compile for the host: {e}"))
}
