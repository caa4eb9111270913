// swift-tools-version:5.9

import PackageDescription

let package = Package(
    name: "Gemma3",
    platforms: [.macOS(.v14)],
    products: [.library(name: "Gemma3", targets: ["Gemma3"])],
    dependencies: [.package(url: "https://github.com/pvieito/PythonKit.git", from: "0.5.1")],
    targets: [
        .target(name: "Gemma3", dependencies: ["PythonKit"]),
        .executableTarget(name: "gemma3-example", dependencies: ["Gemma3"]),
    ]
)
